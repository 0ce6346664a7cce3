"""An export from an existing graph: place, patch, check, and the files beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TypeVar

from boneconv.digest import file_digest
from boneconv.engine.progress import Progress
from boneconv.errors import UsageError
from boneconv.graphs import GRAPH_NAME, Graph, open_graph, refuse_quantised
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.copying import copy_file
from boneconv.io.files import machine_errors
from boneconv.io.staging import require_space
from boneconv.io.weight_files import is_weight_copy
from boneconv.onnx.child import accept_in_child
from boneconv.onnx.outcome import Made
from boneconv.onnx.patching.check import check_patched
from boneconv.onnx.patching.jobs import plan_jobs
from boneconv.onnx.patching.patch import patch_graph
from boneconv.onnx.record import patched_tensors
from boneconv.onnx.request import Request
from boneconv.planning import MergePlan
from boneconv.planning.fingerprints import base_mismatches
from boneconv.planning.record import RECORD_NAME

__all__ = ["export_by_patch"]

_GENAI_CONFIG = "genai_config.json"
#: What belongs to a graph and lies beside it, where it does not come with the base.
_BESIDE = (".json", ".jinja", ".txt", ".model")

_T = TypeVar("_T")


def export_by_patch(
    plan: MergePlan,
    request: Request,
    target: Path,
    note: Callable[[str], None],
    progress: Progress | None,
) -> Made:
    """Patches the given graph into the place of work; raises as `export_onnx`."""
    assert request.graph is not None
    graph = open_graph(request.graph)
    refuse_quantised(graph)
    if request.is_file and graph.data_files:
        raise UsageError(
            "the graph has its weights in files beside it: its export is a folder",
            path=request.out,
            hint="Leave out the suffix",
        )
    base = open_checkpoint(plan.base.path)
    jobs = plan_jobs(graph, base, plan)
    require_space(request.out, _size(graph))
    if progress is not None:
        progress.start(sum(job.planned.nbytes for job in jobs))
    file = target if request.is_file else target / _name(graph)
    advance = progress.advance if progress is not None else lambda nbytes: None
    patched = patch_graph(graph, jobs, file, advance)
    check_patched(graph, patched)
    is_half = any(each.dtype == "BF16" for each in graph.initializers.values())
    accept_in_child(file, load=not is_half)
    if is_half:
        note("ONNX Runtime lacks most bfloat16 kernels on the CPU: this graph was not loaded")
    if not request.is_file:
        _copy_side_files(plan, graph, target)
    bases = {written.name: written.base for written in patched.written}
    return Made(
        graph=file.name,
        weights=len(jobs),
        tensors=patched_tensors(patched.written),
        options={"graph": file_digest(graph.path)},
        strangers=tuple(base_mismatches(plan, bases)),
    )


def _name(graph: Graph) -> str:
    """The graph's name in the folder: its own where a configuration beside it says it."""
    if graph.path.with_name(_GENAI_CONFIG).is_file():
        return graph.path.name
    return GRAPH_NAME


def _size(graph: Graph) -> int:
    files = {graph.path, *graph.data_files.values()}
    return sum(path.stat().st_size for path in files)


def _copy_side_files(plan: MergePlan, graph: Graph, target: Path) -> None:
    """Tokenizer and configuration: the graph's own, then what a merge would put there.

    Where both have a file, the merge's has an adapter's tokens in it; but a configuration of the
    runtime's is only beside the graph.
    """
    taken = {graph.path.name, *graph.data_files, RECORD_NAME}
    beside = {
        PurePosixPath(path.name): path
        for path in sorted(graph.path.parent.iterdir())
        if path.suffix in _BESIDE and path.is_file() and path.name not in taken
    }
    copies = {**beside, **_sides(plan.plan.copies)}
    for name in _sides(plan.plan.texts):
        copies.pop(name, None)
    for name, path in copies.items():
        copy_file(path, target / name)
    for name, content in _sides(plan.plan.texts).items():
        with machine_errors(target / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)


def _sides(files: Mapping[PurePosixPath, _T]) -> dict[PurePosixPath, _T]:
    return {name: each for name, each in files.items() if not is_weight_copy(name)}
