"""Exporting: stage, make the graph by one of four ways, record, check, publish."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boneconv.digest import file_digest
from boneconv.engine.progress import Progress
from boneconv.io.files import Writer, machine_errors
from boneconv.io.staging import Staging
from boneconv.onnx.by_patch import export_by_patch
from boneconv.onnx.by_trace import export_apart, export_by_trace
from boneconv.onnx.outcome import Made
from boneconv.onnx.record import encode_export_record
from boneconv.onnx.request import Request
from boneconv.planning import MergePlan, plan_merge
from boneconv.planning.record import RECORD_NAME, source_entry

__all__ = ["ExportResult", "export_onnx"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        out: The folder, or the file.
        graph: The graph's file.
        record: Its record, a JSON file.
        method: How it was made: ``patch``, ``trace``, ``genai`` or ``runtime-adapters``.
        weights: How many tensors carry the adapters: weights written to a patched graph, weights of
            a traced graph that were found in it again, modules that can be adapted at run time.
        files: The files of ``out``, relative to it.
        notes: What the user should know.
    """

    out: Path
    graph: Path
    record: Path
    method: str
    weights: int
    files: tuple[str, ...]
    notes: tuple[str, ...]


def export_onnx(
    base: PathLike,
    adapter: PathLike,
    out: PathLike,
    *,
    more: Sequence[PathLike] = (),
    graph: PathLike | None = None,
    task: str = "auto",
    dtype: str | None = None,
    opset: int | None = None,
    runtime: str | None = None,
    runtime_adapters: bool = False,
    bat_activation: bool = False,
    workers: int | None = None,
    check: Callable[[Path], None] | None = None,
    allow_base_mismatch: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> ExportResult:
    """Exports a base with one or more adapters to ONNX.

    With ``graph``, the base's graph is patched: its adapted weights are found by their content and
    overwritten with the canonical merge, rounded once into the graph's dtype. No torch is loaded,
    and memory is bounded. Without it, the merged model is traced, which takes its memory several
    times over. ``out`` appears whole or not at all.

    Args:
        base: A folder, a ``.safetensors`` or ``.pth`` file, or a Hub id ``owner/name[@revision]``.
        adapter: The same, for the adapter.
        out: A folder, which gets ``model.onnx``; or a file whose name ends in ``.onnx``, for graphs
            that hold their weights themselves.
        more: Further adapters: merged in order after the first, or each a file of its own with
            ``runtime_adapters``.
        graph: The base's graph: an ``.onnx`` file, or a folder with one.
        task: What a traced model is for, as optimum names it; ``auto`` goes by the architecture.
        dtype: ``float32``, ``float16`` or ``bfloat16``, for the weights of a traced graph.
        opset: The version of ONNX's operators of a traced graph.
        runtime: ``genai`` makes a folder that onnxruntime-genai loads.
        runtime_adapters: Whether the adapters stay apart, as files that a session can swap.
        bat_activation: With ``runtime_adapters``, whether BAT adapters are computed at run time
            too, which slows the whole graph down; otherwise they are refused.
        workers: Workers that compute the merge before tracing; by default one for each core.
        check: Is given the complete output, before it is published; may raise CheckFailedError to
            publish nothing.
        allow_base_mismatch: Whether to go on where a native adapter's fingerprint says that it was
            made for another base.
        force: Whether to replace ``out``.
        progress: Is told how far patching or merging is.
        note: Is told remarks when they arise, such as the memory that tracing is going to take; all
            are in the result too.

    Raises:
        BaseMismatchError: An adapter's fingerprint is not that of the base.
        NameMatchError: The graph is not of this base, or only in part, or merged already; the first
            tensor that differs is named.
        CheckFailedError: A check of the output failed; nothing is published.
        InputError: One of its kinds, for every fault in the input.
        MachineError: The disk or the network failed.
    """
    request = Request(
        Path(out),
        None if graph is None else Path(graph),
        task,
        dtype,
        opset,
        runtime,
        runtime_adapters,
        bat_activation,
        workers,
        force,
    )
    request.check()
    plan = plan_merge(base, adapter, more=more, dtype=request.merge_dtype, workers=workers)
    request.check_place(plan)
    notes = [text for part in plan.parts for text in part.notes()]

    def remark(text: str) -> None:
        notes.append(text)
        if note is not None:
            note(text)

    record = request.out.name + f".{RECORD_NAME}" if request.is_file else RECORD_NAME
    beside = request.out.with_name(record) if request.is_file else None
    with Staging(
        request.out,
        key=os.urandom(16).hex(),
        is_file=request.is_file,
        force=force,
        beside=beside,
    ) as staging:
        make = {"patch": export_by_patch, "runtime-adapters": export_apart}.get(
            request.method, export_by_trace
        )
        made = make(plan, request, staging.target, remark, progress)
        _refuse_mismatch(made, notes, allow=allow_base_mismatch)
        content = _record(plan, request, made)
        place = staging.beside if request.is_file else staging.target / RECORD_NAME
        with machine_errors(place):
            place.write_bytes(content)
        if check is not None:
            check(staging.target)
        _flush([staging.target, *([staging.beside] if request.is_file else [])])
        staging.publish()
    return ExportResult(
        out=request.out,
        graph=request.out if request.is_file else request.out / made.graph,
        record=beside or request.out / RECORD_NAME,
        method=request.method,
        weights=made.weights,
        files=_files(request.out),
        notes=tuple(notes),
    )


def _flush(places: Sequence[Path]) -> None:
    """Flushes files, and all files of folders, to the disk."""
    for place in places:
        for path in place.rglob("*") if place.is_dir() else [place]:
            if path.is_file():
                with Writer(path) as writer:
                    writer.sync()


def _refuse_mismatch(made: Made, notes: list[str], *, allow: bool) -> None:
    if made.strangers and not allow:
        raise made.strangers[0].error()
    notes += [violation.message for violation in made.strangers]


def _record(plan: MergePlan, request: Request, made: Made) -> bytes:
    digests = [file_digest(strength.adapter.weights) for strength in plan.strengths]
    return encode_export_record(
        method=request.method,
        base=source_entry(plan.base),
        adapters=plan.adapter_entries(digests),
        options=made.options,
        tensors=made.tensors,
        fingerprint_ignored=bool(made.strangers),
    )


def _files(out: Path) -> tuple[str, ...]:
    if not out.is_dir():
        return (out.name,)
    found: list[Any] = sorted(path for path in out.rglob("*") if path.is_file())
    return tuple(path.relative_to(out).as_posix() for path in found)
