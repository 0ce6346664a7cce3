"""``--verify`` of the commands that write models: the output is verified before it is published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from boneconv.cli.console import Bar, note

if TYPE_CHECKING:
    from boneconv.verification import Report

__all__ = ["Adapters", "GraphCheck", "MergeCheck"]


@dataclass(frozen=True)
class Adapters:
    """The adapters of an output.

    Attributes:
        first: The first.
        more: Further ones, applied in order.
        components: Those of further components of a pipeline.
    """

    first: str
    more: Sequence[str] = ()
    components: Mapping[str, Sequence[str]] = field(default_factory=dict)


class MergeCheck:
    """Is called with every output of a merge when it is complete; an output that fails raises.

    Attributes:
        verdicts: What was found, a sentence for each output, in order.
    """

    def __init__(
        self,
        base: str,
        outputs: Sequence[Adapters],
        *,
        component: str | None,
        scale: float,
        dtype: str,
        allow_base_mismatch: bool,
        workers: int | None,
        quiet: bool,
    ) -> None:
        """Prepares to verify.

        Args:
            base: The merge's base.
            outputs: The adapters of each output, in the order in which they are completed.
            component: The component of a pipeline that they are merged into.
            scale: The merge's scale.
            dtype: The merge's dtype.
            allow_base_mismatch: As of the merge.
            workers: As of the merge.
            quiet: Whether to show neither progress nor remarks.
        """
        self.verdicts: list[str] = []
        self._base, self._outputs = base, iter(outputs)
        self._settings: dict[str, Any] = {
            "component": component,
            "scale": scale,
            "dtype": dtype,
            "allow_base_mismatch": allow_base_mismatch,
            "workers": workers,
        }
        self._quiet = quiet

    def __call__(self, place: Path) -> None:
        """Verifies the next output.

        Args:
            place: Where it lies until it is published.

        Raises:
            CheckFailedError: It is not what base and adapters mean.
        """
        from boneconv.errors import CheckFailedError
        from boneconv.reporting.summary import headline
        from boneconv.reporting.table import verify_table

        report = self._verify(next(self._outputs), place)
        text = headline(report)
        self.verdicts.append(text)
        if not report.passed:
            click.echo(verify_table(report), err=True)
            raise CheckFailedError(
                "the merged output failed its verification and was not published"
            )
        note(f"verified: {text}", quiet=self._quiet)

    def _verify(self, adapters: Adapters, place: Path) -> Report:
        from boneconv.verification import verify

        bar = Bar("verifying", quiet=self._quiet)
        try:
            return verify(
                self._base,
                adapters.first,
                place,
                more=adapters.more,
                components=adapters.components,
                tolerance="canonical",
                progress=bar,
                **self._settings,
            )
        finally:
            bar.close()


class GraphCheck:
    """Is called with an exported graph when it is complete; one that answers otherwise raises.

    Attributes:
        verdicts: What was found, a sentence for each comparison.
    """

    def __init__(
        self, base: str, adapters: Sequence[str], *, prompts: Path | None, apart: bool, quiet: bool
    ) -> None:
        """Prepares to compare.

        Args:
            base: The export's base.
            adapters: Its adapters, in order.
            prompts: A file of prompts; None for the built-in ones.
            apart: Whether the adapters lie beside the graph, each a file of its own.
            quiet: Whether to show neither progress nor remarks.
        """
        self.verdicts: list[str] = []
        self._base, self._adapters = base, tuple(adapters)
        self._prompts, self._apart, self._quiet = prompts, apart, quiet

    def __call__(self, place: Path) -> None:
        """Compares the graph's answers with those of base and adapters.

        Args:
            place: Where it lies until it is published.

        Raises:
            CheckFailedError: They differ, or the comparison proves nothing.
        """
        if not self._apart:
            self._check(place, self._adapters, None)
            return
        files = _adapter_files(place, self._adapters)
        for adapter, file in zip(self._adapters, files, strict=True):
            self._check(place, (adapter,), file)

    def _check(self, place: Path, adapters: Sequence[str], runtime_adapter: Path | None) -> None:
        from boneconv.behaviour import measure_behaviour
        from boneconv.errors import CheckFailedError
        from boneconv.reporting.behaviour import behaviour_verdict
        from boneconv.reporting.table import behaviour_lines

        bar = Bar("comparing", quiet=self._quiet)
        try:
            report = measure_behaviour(
                self._base,
                adapters,
                place,
                prompts=self._prompts,
                kind="onnx",
                runtime_adapter=runtime_adapter,
                note=lambda text: note(text, quiet=self._quiet),
                progress=bar,
            )
        finally:
            bar.close()
        text = f"{report.status.upper()}: {behaviour_verdict(report)}"
        text = text if runtime_adapter is None else f"{runtime_adapter.stem}: {text}"
        self.verdicts.append(text)
        if not report.passed:
            click.echo("\n".join(behaviour_lines(report)), err=True)
            raise CheckFailedError("the graph failed its verification and was not published")
        note(f"verified: {text}", quiet=self._quiet)


def _adapter_files(place: Path, adapters: Sequence[str]) -> list[Path]:
    """The file of each adapter, which is named as the adapter's folder or file, or its Hub id."""
    files: list[Path] = []
    for number, given in enumerate(adapters, 1):
        path = Path(given).resolve()
        own = (path.stem if path.is_file() else path.name).partition("@")[0]
        names = [f"{own}-{number}", own] if number > 1 else [own]
        found = [place / "adapters" / f"{name}.onnx_adapter" for name in names]
        files.append(next((f for f in found if f.is_file() and f not in files), found[-1]))
    return files
