"""``--verify`` of the commands that write models: the output is verified before it is published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from boneconv.cli.console import Bar, note

if TYPE_CHECKING:
    from boneconv.verification import Report

__all__ = ["MergeCheck"]

#: The adapters of an output: with None, or with each component of a pipeline that has some.
Adapters = Sequence[tuple[str | None, Sequence[str]]]


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
        scale: float,
        dtype: str,
        workers: int | None,
        quiet: bool,
    ) -> None:
        """Prepares to verify.

        Args:
            base: The merge's base.
            outputs: The adapters of each output, in the order in which they are completed.
            scale: The merge's scale.
            dtype: The merge's dtype.
            workers: As of the merge.
            quiet: Whether to show neither progress nor remarks.
        """
        self.verdicts: list[str] = []
        self._base, self._outputs = base, iter(outputs)
        self._scale, self._dtype, self._workers = scale, dtype, workers
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

        for component, adapters in next(self._outputs):
            report = self._verify(component, adapters, place)
            text = headline(report) if component is None else f"{component}: {headline(report)}"
            self.verdicts.append(text)
            if not report.passed:
                click.echo(verify_table(report), err=True)
                raise CheckFailedError(
                    "the merged output failed its verification and was not published"
                )
            note(f"verified: {text}", quiet=self._quiet)

    def _verify(self, component: str | None, adapters: Sequence[str], place: Path) -> Report:
        from boneconv.io.hub import locate
        from boneconv.planning.plan import wanted_of
        from boneconv.verification import verify

        base: str | Path = self._base
        if component is not None:
            base = locate(self._base, wanted_of(component)).path / component
            place = place / component
        bar = Bar("verifying", quiet=self._quiet)
        first, *more = adapters
        try:
            return verify(
                base,
                first,
                place,
                more=more,
                scale=self._scale,
                dtype=self._dtype,
                tolerance="canonical",
                workers=self._workers,
                progress=bar,
            )
        finally:
            bar.close()
