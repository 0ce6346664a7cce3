"""Reports as text for a terminal: the verdict first, then numbers, then what is worst."""

from __future__ import annotations

from collections.abc import Sequence

from boneconv.behaviour.report import BehaviourReport
from boneconv.reporting.behaviour import HEAD, behaviour_facts, behaviour_rows
from boneconv.reporting.summary import (
    RULES,
    Group,
    KindSummary,
    by_kind,
    control,
    errors,
    failed_files,
    failure_groups,
    headline,
    notices,
    worst_first,
)
from boneconv.reporting.text import columns, count, number, percent, plain
from boneconv.verification.report import Report, TensorReport

__all__ = ["behaviour_lines", "verify_table"]

_SHOWN_GROUPS = 12
_SHOWN_NAMES = 4
_HEAD = ("tensor", "status", "correct", "max ULP", "mean ULP", "max abs", "rel. error", "update")
_KIND_HEAD = ("tensors", "", "failed", "correct", "max ULP", "rel. error", "update")


def verify_table(report: Report, *, verbose: bool = False) -> str:
    """A verification as text.

    Args:
        report: What was found.
        verbose: Whether to list every tensor, the worst first, in place of a line for each kind.
    """
    tensors = _tensors(worst_first(report.tensors)) if verbose else _kinds(by_kind(report.tensors))
    parts = (
        [plain(headline(report))],
        _facts(report),
        _findings(report),
        _failures(failure_groups(report)),
        _files(report),
        behaviour_lines(report.behaviour) if report.behaviour is not None else [],
        tensors,
    )
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def behaviour_lines(report: BehaviourReport) -> list[str]:
    """A comparison of answers as lines of text."""
    facts = behaviour_facts(report)
    lines = [plain(f"{title:<11}{text}") for title, text in facts]
    lines[0] = plain(f"{'answers':<11}{report.status}")
    rows = behaviour_rows(report)
    if rows:
        lines += ["", *columns([HEAD, *rows], right=frozenset(range(1, len(HEAD))))]
    return lines


def _facts(report: Report) -> list[str]:
    totals = report.totals
    rows = [("base", report.base)]
    rows += [("adapter", adapter) for adapter in report.adapters]
    rows += [
        ("candidate", f"{report.candidate} ({report.kind})"),
        ("held to", f"{report.tolerance}: {RULES.get(report.tolerance, report.tolerance)}"),
        (
            "tensors",
            f"{totals.tensors:,}: {totals.adapted:,} adapted, {totals.identical:,} the exact "
            f"bytes, {totals.failed:,} failed",
        ),
    ]
    if totals.share_correct is not None:
        worst = "" if totals.max_ulp is None else f", worst {number(totals.max_ulp)} ULP"
        rows.append(("rounding", f"{percent(totals.share_correct)} correct{worst}"))
    if report.scale != 1:
        rows.append(("scale", number(report.scale)))
    rows.append(("control", control(report)))
    return [plain(f"{name:<11}{value}") for name, value in rows]


def _findings(report: Report) -> list[str]:
    return [
        f"{plain(f'{finding.severity}: {finding.message}')} [{finding.code}]"
        for finding in (*errors(report), *notices(report))
    ]


def _failures(groups: Sequence[Group]) -> list[str]:
    lines = []
    for group in groups[:_SHOWN_GROUPS]:
        code = f" [{group.code}]" if group.code else ""
        lines.append(plain(f"{count(len(group.tensors), 'tensor')}: {group.text}") + code)
        lines += [plain(f"  {tensor.name}") for tensor in group.tensors[:_SHOWN_NAMES]]
        lines += _rest(len(group.tensors) - _SHOWN_NAMES, "  ")
    return lines + _rest(len(groups) - _SHOWN_GROUPS, "")


def _rest(left: int, indent: str) -> list[str]:
    return [f"{indent}and {left:,} more"] if left > 0 else []


def _files(report: Report) -> list[str]:
    return [plain(f"file {file.name}: {file.reason}") for file in failed_files(report)]


def _tensors(tensors: Sequence[TensorReport]) -> list[str]:
    rows = [_HEAD]
    rows += [
        (
            tensor.name,
            f"{tensor.status} ({tensor.action})",
            percent(tensor.share_correct),
            number(tensor.max_ulp),
            number(tensor.mean_ulp),
            number(tensor.max_abs),
            number(tensor.relative_frobenius),
            number(tensor.update_norm),
        )
        for tensor in tensors
    ]
    return columns(rows, right=frozenset(range(2, len(_HEAD))))


def _kinds(kinds: Sequence[KindSummary]) -> list[str]:
    if not kinds:
        return []
    rows = [_KIND_HEAD]
    rows += [
        (
            kind.name,
            f"x{kind.tensors}",
            str(kind.failed),
            percent(kind.share_correct),
            number(kind.max_ulp),
            number(kind.relative_frobenius),
            number(kind.update_norm),
        )
        for kind in kinds
    ]
    return columns(rows, right=frozenset(range(1, len(_KIND_HEAD))))
