"""What is asked of an export, checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from boneconv.errors import UsageError
from boneconv.io.staging import check_free
from boneconv.planning import MergePlan

__all__ = ["Request"]

_RUNTIMES = ("genai",)


@dataclass(frozen=True)
class Request:
    """The options of an export.

    Attributes:
        out: A folder, or a file whose name ends in ``.onnx``.
        graph: The base's graph, where there is one.
        task: What the traced model is for.
        dtype: The dtype of a traced graph's weights.
        opset: The version of ONNX's operators of a traced graph.
        runtime: A runtime whose own folder is made.
        runtime_adapters: Whether adapters stay apart from the graph.
        bat_activation: Whether BAT adapters may stay apart too.
        workers: Workers that merge before tracing; one for each usable core when absent.
        force: Whether to replace ``out``.
    """

    out: Path
    graph: Path | None
    task: str
    dtype: str | None
    opset: int | None
    runtime: str | None
    runtime_adapters: bool
    bat_activation: bool
    workers: int | None
    force: bool

    @property
    def merge_dtype(self) -> str:
        """What a merge before the export rounds to: a graph's own dtype, never the base's first."""
        if self.method in ("trace", "genai"):
            return self.dtype or "float32"
        return "keep"

    @property
    def is_file(self) -> bool:
        """Whether the output is a single file."""
        return self.out.suffix == ".onnx"

    @property
    def method(self) -> str:
        """How the graph is made: ``patch``, ``trace``, ``genai`` or ``runtime-adapters``."""
        if self.runtime_adapters:
            return "runtime-adapters"
        if self.runtime is not None:
            return self.runtime
        return "trace" if self.graph is None else "patch"

    def check(self) -> None:
        """Raises UsageError where options do not go together, OutputExistsError for OUT."""
        check_free(self.out, force=self.force)
        if self.runtime is not None and self.runtime not in _RUNTIMES:
            raise UsageError(
                "no runtime that has a folder of its own",
                expected=", ".join(_RUNTIMES),
                found=repr(self.runtime),
            )
        given = [
            name
            for name, is_given in (
                ("task", self.task != "auto"),
                ("dtype", self.dtype is not None),
                ("opset", self.opset is not None),
                ("runtime", self.runtime is not None),
            )
            if is_given
        ]
        if self.graph is not None and given:
            raise UsageError(
                f"a given graph keeps its own {', '.join(given)}",
                hint="Leave out --graph to trace a new one",
            )
        if self.runtime is not None:
            no_use = [name for name in given if name in ("task", "opset")]
            if no_use:
                raise UsageError(f"{self.runtime}'s builder takes no {', '.join(no_use)}")
            if self.runtime_adapters:
                raise UsageError("a runtime's own graph takes no adapters at run time")
        if self.bat_activation and not self.runtime_adapters:
            raise UsageError("BAT's activation form is for graphs with adapters at run time")
        if self.is_file and (self.runtime_adapters or self.runtime is not None):
            raise UsageError("this export is a folder", path=self.out, hint="Leave out the suffix")

    def check_place(self, plan: MergePlan) -> None:
        """Raises UsageError where the output would be, hold or lie in an input."""
        inputs = [plan.base.path, *(source.path for source in plan.adapters)]
        if self.graph is not None:
            inputs.append(self.graph)
        resolved = self.out.resolve()
        for given in (path.resolve() for path in inputs):
            if resolved == given or resolved in given.parents or given in resolved.parents:
                raise UsageError(
                    "the output must not be, hold or lie in an input",
                    path=self.out,
                    found=str(given),
                )
