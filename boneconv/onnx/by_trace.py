"""Exports that need the model: traced, built by onnxruntime-genai, or with adapters apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from boneconv.engine.commit import carry_out
from boneconv.engine.progress import Progress
from boneconv.engine.stream import ShardDigests
from boneconv.engine.workers import usable_cores
from boneconv.errors import UsageError
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.files import machine_errors
from boneconv.onnx.outcome import Made
from boneconv.onnx.request import Request
from boneconv.onnx.runtime.export import RuntimeSummary, export_runtime_adapters
from boneconv.onnx.tracing.genai import build_genai
from boneconv.onnx.tracing.trace import TraceSummary, copy_side_files, trace_graph
from boneconv.planning import MergePlan
from boneconv.planning.fingerprints import base_mismatches
from boneconv.planning.record import RECORD_NAME

__all__ = ["export_apart", "export_by_trace"]

_GRAPH = "model.onnx"


def export_by_trace(
    plan: MergePlan,
    request: Request,
    target: Path,
    note: Callable[[str], None],
    progress: Progress | None,
) -> Made:
    """Merges, then has the merged checkpoint traced, or built by a runtime's builder."""
    _require_folder(plan)
    with _merged(plan, request, progress) as (merged, digests):
        folder = target if not request.is_file else merged.with_name(f"{merged.name}.onnx")
        folder.mkdir(exist_ok=True)
        if request.runtime == "genai":
            built = build_genai(merged, folder, dtype=request.dtype, note=note)
            weights, options = built.matrices, {"dtype": built.dtype}
        else:
            traced = _trace(request, merged, folder, note)
            weights, options = traced.weights, _options(traced)
        if request.is_file:
            _move_single(folder, target, request)
    tensors = {tensor.name: {"digest": digests[tensor.name].output} for tensor in _changed(plan)}
    bases = {name: each.base for name, each in digests.items()}
    return Made(_GRAPH, weights, tensors, options, tuple(base_mismatches(plan, bases)))


def export_apart(
    plan: MergePlan,
    request: Request,
    target: Path,
    note: Callable[[str], None],
    progress: Progress | None,
) -> Made:
    """Writes a graph that takes adapters while it runs, and a file for each adapter."""
    checkpoint = open_checkpoint(plan.base.path)
    names = _adapter_names(plan)

    def export(graph: Path) -> RuntimeSummary:
        return export_runtime_adapters(
            checkpoint,
            dict(zip(names, plan.strengths, strict=True)),
            graph,
            target,
            bat="activation" if request.bat_activation else "refuse",
            note=note,
        )

    options: dict[str, Any] = {"bat_activation": request.bat_activation}
    if request.graph is not None:
        summary = export(request.graph)
    else:
        _require_folder(plan)
        place = _beside(request.out, "traced")
        try:
            place.mkdir(exist_ok=True)
            traced = _trace(request, plan.base.path, place, note)
            options |= _options(traced)
            summary = export(traced.graph)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    copy_side_files(checkpoint, target)
    return Made(summary.graph.name, summary.modules, {}, options, tuple(base_mismatches(plan, {})))


def _trace(
    request: Request, model: Path, folder: Path, note: Callable[[str], None]
) -> TraceSummary:
    return trace_graph(
        model, folder, task=request.task, dtype=request.dtype, opset=request.opset, note=note
    )


def _options(traced: TraceSummary) -> dict[str, Any]:
    """What a traced graph's record says of how it was made."""
    return {"dtype": traced.dtype, "opset": traced.opset, "task": traced.task}


@contextmanager
def _merged(
    plan: MergePlan, request: Request, progress: Progress | None
) -> Iterator[tuple[Path, ShardDigests]]:
    """The merged checkpoint, in a folder beside the output that is removed in the end."""
    place = _beside(request.out, "merged")
    if progress is not None:
        progress.start(plan.plan.work_bytes)
    try:
        digests = carry_out(
            plan.plan,
            place,
            identity=json.dumps([str(s.adapter.weights) for s in plan.strengths]).encode(),
            record=lambda digests: b"{}",
            record_name=RECORD_NAME,
            is_file=False,
            force=True,
            workers=request.workers or usable_cores(),
            advance=progress.advance if progress is not None else lambda nbytes: None,
        )
        yield place, digests
    finally:
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(place.with_name(f"{place.name}.onnx"), ignore_errors=True)


def _beside(out: Path, what: str) -> Path:
    """A folder for what an export needs on its way; a run that was killed leaves it."""
    return out.with_name(f"{out.name}.partial.{what}")


def _require_folder(plan: MergePlan) -> None:
    if not plan.base.path.is_dir():
        raise UsageError(
            "a model is traced from a folder with its config.json",
            path=plan.base.path,
            hint="Give the folder, or a graph to patch with --graph",
        )


def _move_single(folder: Path, target: Path, request: Request) -> None:
    """Moves a graph that is one file to its place."""
    others = sorted(path.name for path in folder.glob(f"{_GRAPH}?*"))
    if others:
        raise UsageError(
            "the graph's weights are too many for one file: its export is a folder",
            path=request.out,
            found=", ".join(others),
            hint="Leave out the suffix",
        )
    with machine_errors(target):
        (folder / _GRAPH).replace(target)


def _changed(plan: MergePlan) -> list[Any]:
    changed = set(plan.accounts.updates) | set(plan.accounts.replaced) | set(plan.accounts.added)
    return [tensor for tensor in plan.plan.tensors if tensor.name in changed]


def _adapter_names(plan: MergePlan) -> list[str]:
    """Names for the adapters' files: those of their folders, numbered where they are equal."""
    names: list[str] = []
    for source, strength in zip(plan.adapters, plan.strengths, strict=True):
        path = strength.adapter.path.resolve()
        given = (source.repo or "").rpartition("/")[2]
        name = given or (path.stem if path.is_file() else path.name) or "adapter"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names
