"""What a report comes to: the verdict in a sentence, failures grouped by cause, the worst first."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from boneconv.reporting.behaviour import behaviour_verdict
from boneconv.reporting.text import count, number, percent
from boneconv.verification.report import (
    CandidateKind,
    FileReport,
    Finding,
    Report,
    Severity,
    Status,
    TensorAction,
    TensorReport,
)

__all__ = [
    "ADAPTED",
    "RULES",
    "Group",
    "KindSummary",
    "by_kind",
    "control",
    "errors",
    "failed_files",
    "failure_groups",
    "headline",
    "notices",
    "verdict",
    "worst_first",
]

ADAPTED = (TensorAction.MERGE, TensorAction.REPLACE, TensorAction.ADD)
_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_NUMBER_IN_TEXT = re.compile(r"\d[\d.,]*(?:e[+-]?\d+)?")

#: What each tolerance holds a tensor to.
RULES = {
    "canonical": "every weight is the exact value rounded once",
    "default": "the exact values rounded once, or one ULP off where float32 cannot tell",
    "peft": "as default, or what PEFT makes of half precision by rounding twice",
    "recorded": "every weight within the error that the candidate records",
}


@dataclass(frozen=True)
class Group:
    """Tensors that failed for one cause.

    Attributes:
        code: The cause's short name; None where it could not be told.
        text: What is wrong, as one sentence.
        tensors: The tensors, in the report's order.
    """

    code: str | None
    text: str
    tensors: tuple[TensorReport, ...]


@dataclass(frozen=True)
class KindSummary:
    """The tensors that differ in the numbers in their names alone.

    Attributes:
        name: Their name, with stars for numbers where they are several.
        tensors: How many there are.
        failed: How many of them failed.
        identical: How many are the canonical ones, byte for byte.
        share_correct: The share of their elements that are correctly rounded.
        max_ulp: Their largest error in ULP.
        relative_frobenius: Their largest relative error.
        update_norm: The largest relative size of an update.
    """

    name: str
    tensors: int
    failed: int
    identical: int
    share_correct: float | None
    max_ulp: float | None
    relative_frobenius: float | None
    update_norm: float | None


def headline(report: Report) -> str:
    """``PASS`` or ``FAIL`` and why, in one sentence."""
    return f"{'PASS' if report.passed else 'FAIL'}: {verdict(report)}"


def verdict(report: Report) -> str:
    """The sentence after PASS or FAIL."""
    if not report.weights_passed:
        return _failure(report)
    if report.behaviour is None:
        return _success(report)
    answers = behaviour_verdict(report.behaviour)
    if report.behaviour.passed:
        return f"{_success(report)}; {answers}"
    return f"the weights agree, but not the answers: {answers}"


def _success(report: Report) -> str:
    """Of weights and files that are as they should be."""
    totals = report.totals
    adapted = [tensor for tensor in report.tensors if tensor.action in ADAPTED]
    others = totals.tensors - len(adapted)
    weights = count(len(adapted), "weight")
    if not adapted:
        return f"{count(others, 'tensor')} as they should be; the adapter changes none of them"
    if report.kind in (CandidateKind.LORA, CandidateKind.ADAPTER):
        return _converted(weights, adapted)
    every = "every one" if len(adapted) > 1 else "it is"
    if all(tensor.identical for tensor in adapted) or totals.share_correct == 1:
        text = f"{weights}, {every} the exact value rounded once"
    else:
        text = (
            f"{weights}, {percent(totals.share_correct)} of their elements correctly rounded, "
            f"none further off than {number(totals.max_ulp)} ULP"
        )
    return f"{text}; {count(others, 'other tensor')} byte for byte" if others else text


def _converted(weights: str, adapted: Sequence[TensorReport]) -> str:
    """Of a LoRA or another adapter, which stands for updates rather than for weights."""
    worst = _largest(tensor.relative_frobenius for tensor in adapted)
    if not worst:
        return f"{weights}, the update of each exactly the adapter's"
    return (
        f"{weights}, the update of each within the error that the candidate records, "
        f"{number(worst)} at most"
    )


def _failure(report: Report) -> str:
    files, wrong = failed_files(report), errors(report)
    if report.totals.failed:
        text = (
            f"{report.totals.failed:,} of {count(report.totals.tensors, 'tensor')} "
            f"{'is' if report.totals.failed == 1 else 'are'} not what base and adapter mean"
        )
    elif files:
        names = ", ".join(file.name for file in files[:3])
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        return f"the weights agree, but not {count(len(files), 'file')}: {names}{more}"
    else:
        return _gist(wrong) if wrong else "the candidate is not what it should be"
    return f"{text}: {_gist(wrong)}" if wrong else text


def _gist(findings: Sequence[Finding]) -> str:
    """What is wrong with the most tensors, without the list of names at its end."""
    return max(findings, key=lambda finding: len(finding.tensors)).message.split(": ")[0]


def errors(report: Report) -> list[Finding]:
    """The findings that fail the verification."""
    return [finding for finding in report.findings if finding.severity is Severity.ERROR]


def failed_files(report: Report) -> list[FileReport]:
    """The files that are not as they should be."""
    return [file for file in report.files if file.status is Status.FAIL]


def notices(report: Report) -> list[Finding]:
    """The findings that fail nothing: warnings and notes."""
    return [finding for finding in report.findings if finding.severity is not Severity.ERROR]


def control(report: Report) -> str:
    """How far the adapter moves the weights: parity with an adapter that does nothing is none."""
    norm = report.totals.update_norm
    if norm is None:
        return "no weight is merged, so that agreement says nothing about the adapter"
    if norm == 0:
        return "the adapter moves no weight, so that agreement says nothing about it"
    return f"the adapter moves the weights by {number(100 * norm)} % of their norm"


def failure_groups(report: Report) -> list[Group]:
    """The tensors that failed, by cause, without those that an error lists: the most first."""
    told = {name for finding in errors(report) for name in finding.tensors}
    groups: dict[tuple[str | None, str], list[TensorReport]] = defaultdict(list)
    for tensor in report.failures:
        if tensor.name in told:
            continue
        text = _cause(tensor)
        if tensor.code is None:
            text = _NUMBER_IN_TEXT.sub("N", text)
        groups[tensor.code, text].append(tensor)
    found = []
    for (code, _), tensors in groups.items():
        texts = [_cause(tensor) for tensor in worst_first(tensors)]
        text = texts[0] if len(set(texts)) == 1 else f"{texts[0]} (the worst)"
        found.append(Group(code, text, tuple(tensors)))
    return sorted(found, key=lambda group: -len(group.tensors))


def _cause(tensor: TensorReport) -> str:
    return tensor.diagnosis or tensor.reason or "not what it should be"


def worst_first(tensors: Iterable[TensorReport]) -> list[TensorReport]:
    """Failures before the rest, larger errors before smaller ones."""
    return sorted(tensors, key=_badness)


def _badness(tensor: TensorReport) -> tuple[float, ...]:
    return (
        tensor.status is not Status.FAIL,
        tensor.action not in (TensorAction.MISSING, TensorAction.EXTRA),
        tensor.status is Status.FAIL and tensor.max_ulp is not None,
        -_finite(tensor.max_ulp),
        tensor.share_correct if tensor.share_correct is not None else 1,
        -_finite(tensor.relative_frobenius),
        tensor.action not in ADAPTED,
    )


def _finite(value: float | None) -> float:
    """A size that can be put in order: NaN is the largest."""
    return 0 if value is None else math.inf if math.isnan(value) else value


def by_kind(tensors: Sequence[TensorReport]) -> list[KindSummary]:
    """The adapted tensors, and those that failed, by their names without numbers."""
    groups: dict[str, list[TensorReport]] = defaultdict(list)
    for tensor in tensors:
        if tensor.action in ADAPTED or tensor.status is Status.FAIL:
            groups[_NUMBER.sub(".*", tensor.name)].append(tensor)
    names = {name: name if len(found) > 1 else found[0].name for name, found in groups.items()}
    return [_kind(names[name], found) for name, found in groups.items()]


def _kind(name: str, found: Sequence[TensorReport]) -> KindSummary:
    rounded = [t for t in found if t.share_correct is not None]
    elements = sum(t.elements for t in rounded)
    right = sum((t.share_correct or 0) * t.elements for t in rounded)
    wrong = any(t.share_correct != 1 for t in rounded)
    return KindSummary(
        name=name,
        tensors=len(found),
        failed=sum(t.status is Status.FAIL for t in found),
        identical=sum(t.identical for t in found),
        share_correct=(right / elements if wrong else 1.0) if elements else None,
        max_ulp=_largest(t.max_ulp for t in found),
        relative_frobenius=_largest(t.relative_frobenius for t in found),
        update_norm=_largest(t.update_norm for t in found),
    )


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None, key=_finite)
