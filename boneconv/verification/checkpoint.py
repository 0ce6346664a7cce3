"""Verifying a merged checkpoint or file: every tensor, every file, both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from boneconv.digest import same_values
from boneconv.engine.plan import Action, PlannedTensor
from boneconv.engine.progress import Progress
from boneconv.io.safetensors import StoredTensor, Tensor
from boneconv.planning.plan import MergePlan
from boneconv.verification.candidate import Candidate
from boneconv.verification.diagnosis import Doctor
from boneconv.verification.engine import Found, compare_pairs
from boneconv.verification.files import check_files
from boneconv.verification.pairs import Heads, Pair, comparable, like
from boneconv.verification.places import layer_of
from boneconv.verification.report import (
    CandidateKind,
    FileReport,
    Finding,
    Status,
    TensorReport,
)
from boneconv.verification.summary import findings_of
from boneconv.verification.verdict import absent, incomparable, judge, shared, stranger

__all__ = ["Outcome", "verify_checkpoint", "verify_tensors"]

_UNTOUCHED = (Action.COPY, Action.CAST)


@dataclass(frozen=True)
class Outcome:
    """What was found of a candidate.

    Attributes:
        tensors: The tensors' reports.
        files: The files' reports.
        findings: What follows from them.
        found: What was measured, by tensor.
    """

    tensors: tuple[TensorReport, ...]
    files: tuple[FileReport, ...]
    findings: tuple[Finding, ...]
    found: Mapping[str, Found]


def verify_checkpoint(
    planned: MergePlan,
    candidate: Candidate,
    rule: str,
    *,
    workers: int | None,
    progress: Progress | None,
) -> Outcome:
    """Holds a candidate against a plan.

    Args:
        planned: What it should be.
        candidate: What it is.
        rule: ``canonical``, ``default`` or ``peft``.
        workers: How many workers compute; None for one on each usable core.
        progress: Is told how far it is.

    Raises:
        NonFiniteError: Base or adapter hold NaN or infinity, or a merged value overflows.
        FormatError, MachineError: Reading failed.
    """
    files: list[FileReport] = []
    if candidate.kind is CandidateKind.CHECKPOINT:
        files = check_files(planned.plan, candidate)
    outcome = verify_tensors(
        planned,
        candidate.tensors,
        candidate.file_of,
        rule,
        workers=workers,
        progress=progress,
        by_file=True,
    )
    return replace(outcome, files=tuple(files))


def verify_tensors(
    planned: MergePlan,
    held: Mapping[str, Tensor],
    place_of: Mapping[str, str],
    rule: str,
    *,
    workers: int | None,
    progress: Progress | None,
    by_file: bool = False,
) -> Outcome:
    """Holds tensors against a plan.

    Args:
        planned: What they should be.
        held: The candidate's tensors by the plan's names, and strangers.
        place_of: Where each is in the candidate.
        rule: ``canonical``, ``default`` or ``peft``.
        workers: How many workers compute.
        progress: Is told how far it is.
        by_file: Whether the places are files.
    """
    wanted = {tensor.name: tensor for tensor in planned.plan.tensors}
    fingerprinted = any(strength.adapter.base_digests for strength in planned.strengths)
    groups = [
        [
            Pair(
                like(tensor, held[tensor.name].dtype),
                held[tensor.name],
                hashed=fingerprinted and tensor.kernel is None,
            )
            for tensor in shard.tensors
            if tensor.name in held and comparable(tensor, held[tensor.name])
        ]
        for shard in planned.plan.shards
    ]
    advance = progress.advance if progress is not None else lambda nbytes: None
    if progress is not None:
        progress.start(sum(pair.held.nbytes for group in groups for pair in group))
    found = compare_pairs(groups, workers=workers, advance=advance)
    doctor = Doctor(_base_tensors(planned))
    pairs = {pair.planned.name: pair for group in groups for pair in group}
    others = _Heads(found)
    reports = []
    for name, tensor in held.items():
        place = place_of.get(name)
        if name not in wanted:
            report = stranger(name, tensor, place)
            twin = _twin(name, tensor, {n: held[n] for n in wanted if n in held})
            reports.append(report if twin is None else shared(report, twin))
        elif name not in pairs:
            reports.append(_incomparable(doctor, wanted[name], tensor, place))
        else:
            pair, measures = pairs[name], found[name].measures
            report = judge(
                pair.planned, measures, rule, place=place, wanted_dtype=wanted[name].dtype
            )
            if report.status is Status.FAIL:
                report = _diagnosed(report, doctor, pair, found[name], others)
            reports.append(report)
    reports += [_lost(name, wanted, held) for name in wanted if name not in held]
    return Outcome(
        tuple(reports), (), tuple(findings_of(reports, wanted, rule, by_file=by_file)), found
    )


def _lost(
    name: str, wanted: Mapping[str, PlannedTensor], held: Mapping[str, Tensor]
) -> TensorReport:
    """The report of a tensor that is not there, and need not be if it is another's twin."""
    planned = wanted[name]
    report = absent(planned, _why_missing(name, wanted))
    if planned.action not in _UNTOUCHED:
        return report
    others = {
        other: tensor.source
        for other, tensor in wanted.items()
        if other in held and tensor.action in _UNTOUCHED
    }
    twin = _twin(name, planned.source, others)
    return report if twin is None else shared(report, twin)


def _twin(name: str, tensor: Tensor, others: Mapping[str, Tensor]) -> str | None:
    """A matrix outside the layers that has the same values, as a tied head has its embedding's.

    Some tools write such a matrix twice, others once.
    """
    if len(tensor.shape) != 2 or layer_of(name) is not None:
        return None
    for other, found in others.items():
        alike = (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        if other != name and alike and layer_of(other) is None and same_values(tensor, found):
            return other
    return None


def _why_missing(name: str, wanted: Mapping[str, PlannedTensor]) -> str:
    source = wanted[name].source
    if isinstance(source, StoredTensor) and source.name != name and wanted[name].updates:
        return f"is missing: the adapter unties it from {source.name!r}"
    return "is missing"


def _base_tensors(planned: MergePlan) -> dict[str, Tensor]:
    """The base's tensors by name, those of replaced ones too."""
    known: dict[str, Tensor] = {
        tensor.source.name: tensor.source
        for tensor in planned.plan.tensors
        if isinstance(tensor.source, StoredTensor) and not _is_from_adapter(planned, tensor.source)
    }
    for homes in planned.accounts.homes:
        known |= {stored.name: stored for stored in homes.values()}
    return known


def _is_from_adapter(planned: MergePlan, tensor: StoredTensor) -> bool:
    return any(tensor.path == strength.adapter.weights for strength in planned.strengths)


def _incomparable(
    doctor: Doctor, wanted: PlannedTensor, held: Tensor, place: str | None
) -> TensorReport:
    report = incomparable(wanted, held, place)
    if held.shape != wanted.shape and sorted(held.shape) == sorted(wanted.shape):
        diagnosis = doctor.transposed(Pair(wanted, held))
        if diagnosis is not None:
            return replace(report, code=diagnosis.code, diagnosis=diagnosis.text)
    return report


def _diagnosed(
    report: TensorReport, doctor: Doctor, pair: Pair, found: Found, others: _Heads
) -> TensorReport:
    diagnosis = doctor.diagnose(pair, found.measures)
    if diagnosis is not None and diagnosis.code not in ("elements-differ", "partly-applied"):
        return replace(report, code=diagnosis.code, diagnosis=diagnosis.text)
    text = others.owner(report.name, found.heads)
    if text is not None:
        return replace(report, code="swapped", diagnosis=text)
    if diagnosis is not None:
        return replace(report, code=diagnosis.code, diagnosis=diagnosis.text)
    return report


class _Heads:
    """Whose values a tensor begins with."""

    def __init__(self, found: Mapping[str, Found]) -> None:
        self._merged: dict[bytes, list[str]] = {}
        self._base: dict[bytes, list[str]] = {}
        for name, each in found.items():
            if each.heads is not None:
                self._merged.setdefault(each.heads.want, []).append(name)
                if each.heads.base is not None:
                    self._base.setdefault(each.heads.base, []).append(name)

    def owner(self, name: str, heads: Heads | None) -> str | None:
        """Says whose values another tensor holds; None where that is not clear."""
        if heads is None or heads.have == heads.want:
            return None
        for known, text in (
            (self._merged, "holds the values of"),
            (self._base, "holds the base's"),
        ):
            owners: Sequence[str] = known.get(heads.have, [])
            if len(owners) == 1 and owners[0] != name:
                return f"{text} {owners[0]}"
        return None
