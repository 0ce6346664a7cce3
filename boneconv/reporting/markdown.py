"""A verification as Markdown: for a comment on a pull request, or a step's summary in CI.

GitHub takes 65,536 characters in a comment and 1 MiB in a summary: the text stays below both
whatever the number of tensors, and says what it leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from boneconv import __version__
from boneconv.reporting.behaviour import HEAD, behaviour_facts, behaviour_rows
from boneconv.reporting.summary import (
    RULES,
    by_kind,
    control,
    failed_files,
    failure_groups,
    verdict,
    worst_first,
)
from boneconv.reporting.text import count, number, percent, plain
from boneconv.verification.report import Report, TensorReport

__all__ = ["LIMIT", "verify_markdown"]

#: The most characters that a text has.
LIMIT = 60_000
_MOST_ROWS = 100


def verify_markdown(report: Report) -> str:
    """The text, of at most `LIMIT` characters, with the verdict as its heading."""
    rows = _MOST_ROWS
    while True:
        text = "\n\n".join(filter(None, (section(report, rows) for section in _SECTIONS))) + "\n"
        if len(text) <= LIMIT or rows == 0:
            return text
        rows //= 2


def _heading(report: Report, rows: int) -> str:
    mark = "\N{WHITE HEAVY CHECK MARK} PASS" if report.passed else "\N{CROSS MARK} FAIL"
    return f"### {mark} · boneconv verify\n\n{_escaped(verdict(report)).rstrip('.')}."


def _facts(report: Report, rows: int) -> str:
    totals = report.totals
    facts = [("base", _code(report.base))]
    facts += [("adapter", _code(adapter)) for adapter in report.adapters[: rows + 1]]
    facts += [
        ("candidate", f"{_code(report.candidate)} ({report.kind})"),
        ("held to", f"{report.tolerance}: {RULES.get(report.tolerance, report.tolerance)}"),
        (
            "tensors",
            f"{totals.tensors:,}: {totals.adapted:,} adapted, {totals.identical:,} the exact "
            f"bytes, {totals.failed:,} failed",
        ),
        (
            "rounding",
            f"{percent(totals.share_correct)} correct, worst {number(totals.max_ulp)} ULP",
        ),
        ("control", control(report)),
    ]
    return _table(("", ""), facts)


def _findings(report: Report, rows: int) -> str:
    shown = report.findings[:rows]
    lines = [f"- **{f.severity}** {_escaped(f.message)} {_code(f.code)}" for f in shown]
    return "\n".join(lines + _rest(len(report.findings) - len(shown)))


def _failures(report: Report, rows: int) -> str:
    groups = failure_groups(report)
    lines = []
    for group in groups[:rows]:
        names = ", ".join(_code(tensor.name) for tensor in group.tensors[:3])
        more = f" and {len(group.tensors) - 3:,} more" if len(group.tensors) > 3 else ""
        tensors = count(len(group.tensors), "tensor")
        lines.append(f"- **{tensors}** {_escaped(group.text)}: {names}{more}")
    return "\n".join(lines + _rest(len(groups) - len(groups[:rows])))


def _files(report: Report, rows: int) -> str:
    files = failed_files(report)
    lines = [f"- file {_code(f.name)}: {_escaped(f.reason or 'wrong')}" for f in files[:rows]]
    return "\n".join(lines + _rest(len(files) - len(lines)))


def _behaviour(report: Report, rows: int) -> str:
    if report.behaviour is None:
        return ""
    facts = [(title, _escaped(text)) for title, text in behaviour_facts(report.behaviour)]
    table = _table(("answers", ""), facts)
    found = [[_escaped(cell) for cell in row] for row in behaviour_rows(report.behaviour)]
    return f"{table}\n\n{_table(HEAD, found)}" if found else table


def _worst(report: Report, rows: int) -> str:
    failed = worst_first(report.failures)
    if not failed or not rows:
        return ""
    head = ("failed tensor", "correct", "max ULP", "rel. error", "update")
    table = _table(head, [_row(tensor) for tensor in failed[:rows]])
    rest = _rest(len(failed) - len(failed[:rows]))
    return _folded(f"The {count(len(failed), 'failed tensor')}, worst first", table, rest)


def _row(tensor: TensorReport) -> tuple[str, ...]:
    return (
        _code(tensor.name),
        percent(tensor.share_correct),
        number(tensor.max_ulp),
        number(tensor.relative_frobenius),
        number(tensor.update_norm),
    )


def _kinds(report: Report, rows: int) -> str:
    kinds = by_kind(report.tensors)
    if not kinds or not rows:
        return ""
    head = ("weights", "number", "failed", "correct", "max ULP", "rel. error", "update")
    table = _table(
        head,
        [
            (
                _code(kind.name),
                str(kind.tensors),
                str(kind.failed),
                percent(kind.share_correct),
                number(kind.max_ulp),
                number(kind.relative_frobenius),
                number(kind.update_norm),
            )
            for kind in kinds[:rows]
        ],
    )
    return _folded("Weights by kind", table, _rest(len(kinds) - len(kinds[:rows])))


def _footer(report: Report, rows: int) -> str:
    return f"<sub>boneconv {__version__}</sub>"


_SECTIONS: tuple[Callable[[Report, int], str], ...] = (
    _heading,
    _facts,
    _findings,
    _failures,
    _files,
    _behaviour,
    _worst,
    _kinds,
    _footer,
)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _folded(title: str, body: str, rest: Sequence[str]) -> str:
    more = "".join(f"\n\n{line}" for line in rest)
    return f"<details><summary>{title}</summary>\n\n{body}{more}\n\n</details>"


def _rest(left: int) -> list[str]:
    return [f"- and {left:,} more"] if left > 0 else []


#: What Markdown reads as markup, underscores and colons only where they could be.
_MARKUP = re.compile(
    r"[\\`*{}\[\]#+!|~@$<>&\"']|:(?=\S)|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])|(?<=www)\."
)


def _escaped(text: str) -> str:
    """A text in which nothing is markup: no tag, link, mention or cell's end."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", plain(text))


def _code(text: str) -> str:
    """A name in the type of code, in which nothing is markup."""
    name = plain(text)
    if not name.strip() or name != name.strip() or "`" in name or "|" in name:
        return f"<code>{_escaped(name)}</code>"
    return f"`{name}`"
