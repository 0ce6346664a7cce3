"""From measures to a tensor's report: what passes under which rule, and why not."""

from __future__ import annotations

import math
from dataclasses import replace

from boneconv.dtypes import FLOATS
from boneconv.engine.plan import Action, PlannedTensor
from boneconv.io.safetensors import Tensor
from boneconv.verification.measures import Measures
from boneconv.verification.places import kind_of, layer_of
from boneconv.verification.report import Status, TensorAction, TensorReport

__all__ = ["absent", "incomparable", "judge", "shared", "stranger"]


def judge(
    planned: PlannedTensor,
    found: Measures,
    rule: str,
    *,
    place: str | None,
    wanted_dtype: str | None = None,
) -> TensorReport:
    """The report of a compared tensor, without a diagnosis.

    Args:
        planned: What it should be; its dtype is the candidate's.
        found: What was measured.
        rule: ``canonical``, ``default`` or ``peft``.
        place: Where it is in the candidate.
        wanted_dtype: The dtype that it should have.
    """
    reason = _reason(planned, found, rule)
    if wanted_dtype is not None and wanted_dtype != planned.dtype:
        reason = f"its dtype is {planned.dtype}, expected {wanted_dtype}"
    is_float, is_merged = planned.dtype in FLOATS, bool(planned.updates)
    return TensorReport(
        name=planned.name,
        action=TensorAction(planned.action),
        status=Status.PASS if reason is None else Status.FAIL,
        dtype=planned.dtype,
        shape=planned.shape,
        elements=math.prod(planned.shape),
        identical=found.differing == 0,
        module=planned.updates[0].block.module if is_merged else None,
        layer=layer_of(planned.name),
        kind=kind_of(planned.name),
        share_correct=found.share_correct,
        max_ulp=found.max_ulp if is_float else None,
        mean_ulp=found.mean_ulp if is_float else None,
        max_abs=found.max_abs if is_float else None,
        relative_frobenius=found.relative_frobenius if is_float else None,
        cosine=found.cosine if is_merged else None,
        update_norm=found.update_norm if is_merged else None,
        reason=reason,
        place=place,
    )


def _reason(planned: PlannedTensor, found: Measures, rule: str) -> str | None:
    if found.differing == 0:
        return None
    if found.nonfinite:
        return f"{found.nonfinite:,} of its {found.elements:,} elements are NaN or infinite"
    if not planned.updates:
        unit = "elements" if planned.dtype in FLOATS else "bytes"
        what = "the base's" if planned.action in (Action.COPY, Action.CAST) else "the adapter's"
        return f"{found.differing:,} of its {found.elements:,} {unit} are not {what}"
    if rule == "canonical":
        return f"{found.differing:,} of its {found.elements:,} elements are not the canonical ones"
    left = found.unexplained if rule == "peft" else found.beyond
    if left == 0:
        return None
    return (
        f"{found.wrong:,} of its {found.elements:,} elements are not the correctly rounded ones, "
        f"by up to {found.max_ulp:,.0f} ULP; not all can come of a merge in float32"
    )


def absent(planned: PlannedTensor, reason: str) -> TensorReport:
    """The report of a tensor that the candidate lacks."""
    return _bare(planned.name, planned, TensorAction.MISSING, reason, planned)


def shared(report: TensorReport, other: str) -> TensorReport:
    """The report of a tensor that is there once for two: a head and the embedding it is tied to."""
    return replace(report, status=Status.PASS, reason=f"has the values of {other}, which is there")


def stranger(name: str, held: Tensor, place: str | None) -> TensorReport:
    """The report of a tensor that should not be there."""
    reason = "neither the base nor the adapter has it"
    return _bare(name, held, TensorAction.EXTRA, reason, None, place)


def incomparable(planned: PlannedTensor, held: Tensor, place: str | None) -> TensorReport:
    """The report of a tensor of another shape, or of a dtype that is no number's."""
    if held.shape != planned.shape:
        reason = f"its shape is {list(held.shape)}, expected {list(planned.shape)}"
    else:
        reason = f"its dtype is {held.dtype}, expected {planned.dtype}"
    return _bare(planned.name, held, TensorAction(planned.action), reason, planned, place)


def _bare(
    name: str,
    tensor: Tensor | PlannedTensor,
    action: TensorAction,
    reason: str,
    planned: PlannedTensor | None,
    place: str | None = None,
) -> TensorReport:
    updates = planned.updates if planned is not None else ()
    return TensorReport(
        name=name,
        action=action,
        status=Status.FAIL,
        dtype=tensor.dtype,
        shape=tensor.shape,
        elements=math.prod(tensor.shape),
        identical=False,
        module=updates[0].block.module if updates else None,
        layer=layer_of(name),
        kind=kind_of(name),
        reason=reason,
        place=place,
    )
