"""Converted adapters: held against the adapter that they were made from, on a base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from boneconv.config import Variant
from boneconv.digest import same_values
from boneconv.engine.plan import PlannedTensor, Update
from boneconv.engine.progress import Progress
from boneconv.engine.station import stages_of
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.hub import Source
from boneconv.io.safetensors import Tensor
from boneconv.names import resolve
from boneconv.planning.plan import MergePlan, Options, PathLike, plan_located, stacks
from boneconv.verification.alternatives import expected
from boneconv.verification.bands import Band, compare_updates
from boneconv.verification.fingerprints import check_base
from boneconv.verification.lora import judge_lora, open_lora
from boneconv.verification.measures import Measures
from boneconv.verification.places import kind_of, layer_of
from boneconv.verification.report import (
    CandidateKind,
    Finding,
    Report,
    Severity,
    Status,
    TensorAction,
    TensorReport,
)
from boneconv.verification.samples import Run
from boneconv.verification.summary import findings_of, ordered_findings, totals_of
from boneconv.verification.verdict import absent, stranger

__all__ = ["verify_converted"]

_CHANGED = ("merge", "replace", "add")
_SAME = 1e-12  # of two exact updates, computed in float64

_Judged = tuple[TensorReport, Measures]


def verify_converted(
    base: Source,
    adapter: PathLike,
    candidate: Path,
    kind: CandidateKind,
    *,
    scale: float | None,
    allow_base_mismatch: bool,
    progress: Progress | None,
) -> Report:
    """Holds a LoRA or another adapter against the one that it stands for.

    Raises:
        InputError: One of its kinds, for every fault of base, adapter or candidate.
        MachineError: Reading failed.
    """
    strength = 1.0 if scale is None else scale
    planned = _planned(base, adapter, strength)
    wanted = {t.name: t for t in planned.plan.tensors if str(t.action) in _CHANGED}
    notes: list[Finding] = []
    if kind is CandidateKind.LORA:
        judged, rule, notes = _lora(base, planned, wanted, candidate, progress)
    else:
        judged, rule = _adapter(base, wanted, candidate, progress), "canonical"
    tensors = tuple(report for report, _ in judged)
    notes += check_base(planned, {}, {}, allowed=allow_base_mismatch)
    findings = [*findings_of(tensors, wanted, rule), *notes]
    return Report(
        base=base.given,
        adapters=tuple(source.given for source in planned.adapters),
        candidate=str(candidate),
        kind=kind,
        numerics=None,
        tolerance=rule,
        scale=strength,
        dtype="keep",
        tensors=tensors,
        files=(),
        findings=ordered_findings(findings),
        totals=replace(
            totals_of(tensors, [measures for _, measures in judged]), share_correct=None
        ),
    )


def _planned(base: Source, adapter: PathLike, scale: float) -> MergePlan:
    options = Options.parse(
        scale=scale, dtype="keep", max_shard_size=None, card=False, workers=None
    )
    return plan_located(base, stacks(adapter), options)


def _told(progress: Progress | None, tensors: Sequence[PlannedTensor]) -> Iterator[PlannedTensor]:
    if progress is not None:
        progress.start(sum(tensor.nbytes for tensor in tensors))
    for tensor in tensors:
        yield tensor
        if progress is not None:
            progress.advance(tensor.nbytes)


def _lora(
    base: Source,
    planned: MergePlan,
    wanted: Mapping[str, PlannedTensor],
    candidate: Path,
    progress: Progress | None,
) -> tuple[list[_Judged], str, list[Finding]]:
    lora = open_lora(candidate)
    stored = open_checkpoint(base.path)
    names = {f"{module}.weight": module for module in lora.modules}
    homes = resolve(names.keys() | lora.saved.keys(), stored.tensors.keys(), stored.config)
    place = {**{name: name for name in homes.missing}, **homes.found}
    modules = {place[name]: module for name, module in names.items()}
    saved = {place[name]: tensor for name, tensor in lora.saved.items()}
    judged: list[_Judged] = []
    for tensor in _told(progress, list(wanted.values())):
        if tensor.updates and tensor.name in modules:
            judged.append(judge_lora(tensor, lora, modules[tensor.name]))
        elif not tensor.updates and tensor.name in saved:
            judged.append((_saved(tensor, saved[tensor.name]), Measures()))
        else:
            judged.append((absent(tensor, "is missing"), Measures()))
    for name, module in modules.items():
        if name not in wanted or not wanted[name].updates:
            judged.append((stranger(name, lora.modules[module].lora_a, None), Measures()))
    for name, found in saved.items():
        if name not in wanted:
            judged.append((stranger(name, found, None), Measures()))
    notes = []
    if not lora.errors:
        bat = any(u.block.variant is Variant.BAT for t in wanted.values() for u in t.updates)
        allowed = "0.05" if bat else "what the dtype of its factors allows"
        text = f"it has no record of its error: held against {allowed}"
        notes.append(Finding(Severity.NOTE, "assumed-error", text))
    return judged, "recorded" if lora.errors else "default", notes


def _adapter(
    base: Source,
    wanted: Mapping[str, PlannedTensor],
    candidate: Path,
    progress: Progress | None,
) -> list[_Judged]:
    other = _planned(base, candidate, 1.0)
    held = {t.name: t for t in other.plan.tensors if str(t.action) in _CHANGED}
    judged: list[_Judged] = []
    for tensor in _told(progress, list(wanted.values())):
        if tensor.name not in held:
            judged.append((absent(tensor, "is missing"), Measures()))
        elif tensor.updates and held[tensor.name].updates:
            judged.append(_update(tensor, held[tensor.name]))
        elif not tensor.updates and not held[tensor.name].updates:
            judged.append((_saved(tensor, held[tensor.name].source), Measures()))
        else:
            judged.append((absent(tensor, "is of another kind there"), Measures()))
    for name, tensor in held.items():
        if name not in wanted:
            judged.append((stranger(name, tensor.source, None), Measures()))
    return judged


def _saved(tensor: PlannedTensor, held: Tensor) -> TensorReport:
    """A replaced tensor: the same bytes."""
    same = same_values(tensor.source, held)
    return _report(tensor, held.dtype, same, None if same else "is not the adapter's")


def _update(tensor: PlannedTensor, held: PlannedTensor) -> _Judged:
    """A block: the same bytes, or at least exactly the same update."""
    dtype = held.updates[0].block.tensor.dtype
    if len(tensor.updates) == len(held.updates) and all(
        _same_update(*pair) for pair in zip(tensor.updates, held.updates, strict=True)
    ):
        return _report(tensor, dtype, True, None), Measures()
    stages = stages_of(held)

    def update(band: Band) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        rows = Run(band.place.start, band.base, band.base)
        return expected(rows, stages) - band.base

    found = compare_updates(tensor, stages_of(tensor), update)
    error = found.relative_frobenius
    passes = error is not None and error <= _SAME
    reason = None if passes else _why(tensor.updates[0], held.updates[0], error)
    report = replace(
        _report(tensor, dtype, passes, reason),
        max_abs=found.max_abs,
        relative_frobenius=error,
        cosine=found.cosine,
        update_norm=found.update_norm,
    )
    if not passes and tensor.updates[0].block.axis is not held.updates[0].block.axis:
        text = "BAT's blocks run along another axis"
        report = replace(report, code="wrong-axis", diagnosis=text)
    return report, found


def _same_update(one: Update, other: Update) -> bool:
    same_axis = one.block.variant is not Variant.BAT or one.block.axis is other.block.axis
    return (
        (one.block.variant, one.block.rank, one.scale, one.residue)
        == (other.block.variant, other.block.rank, other.scale, other.residue)
        and same_axis
        and same_values(one.block.tensor, other.block.tensor)
    )


def _why(one: Update, other: Update, error: float | None) -> str:
    block, found = one.block, other.block
    if block.variant is not found.variant:
        return f"is a {found.variant} block, expected {block.variant}"
    if block.variant is Variant.BAT and block.axis is not found.axis:
        return f"its blocks run along the {found.axis} axis, expected {block.axis}"
    if one.scale != other.scale:
        return f"its strength is {other.scale:g}, expected {one.scale:g}"
    off = "where there should be none" if error is None else f"off by {error:.3g}"
    return f"its update is {off}"


def _report(tensor: PlannedTensor, dtype: str, same: bool, reason: str | None) -> TensorReport:
    return TensorReport(
        name=tensor.name,
        action=TensorAction(tensor.action),
        status=Status.PASS if same else Status.FAIL,
        dtype=dtype,
        shape=tensor.shape,
        elements=math.prod(tensor.shape),
        identical=same,
        module=tensor.updates[0].block.module if tensor.updates else None,
        layer=layer_of(tensor.name),
        kind=kind_of(tensor.name),
        reason=reason,
    )
