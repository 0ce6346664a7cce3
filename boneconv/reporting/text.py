"""Numbers and names as people read them, the same in every report.

Names come from files that strangers made: `plain` takes from them all that a terminal, a log or a
page would obey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from boneconv.errors import printable

__all__ = ["NONE", "columns", "cosine", "count", "number", "percent", "plain", "shape"]

#: What stands for a number that has no meaning.
NONE = "-"
_LONGEST_NAME = 300
_WIDEST_CELL = 100


def plain(text: str) -> str:
    """A text in one line, with controls and direction marks escaped, cut where it is endless."""
    line = printable(text).replace("\n", "\\n")
    return line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - 3]}..."


def number(value: float | None) -> str:
    """Three significant digits; whole numbers below a million in full."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "NaN")
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """A share of 0 to 1 as a percentage: 100 % means all, 0 % none, whatever the rounding."""
    if share is None:
        return NONE
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    digits = next((n for n in range(2, 12) if 0 < round(100 * share, n) < 100), 12)
    return f"{100 * share:.{digits}f} %"


def shape(sizes: Sequence[int] | None) -> str:
    """``[out, in]`` as 576x1536."""
    if sizes is None:
        return NONE
    return "x".join(map(str, sizes)) or "scalar"


def count(how_many: int, noun: str) -> str:
    """A number with its noun: 1 tensor, 2 tensors."""
    return f"{how_many:,} {noun}{'' if how_many == 1 else 's'}"


def columns(
    rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset(), indent: str = ""
) -> list[str]:
    """Rows laid out in columns, one line each; ``right`` are those that align to the right."""
    lines = [[_clipped(plain(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    laid_out = []
    for line in lines:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        laid_out.append((indent + "  ".join(cells)).rstrip())
    return laid_out


def _clipped(cell: str) -> str:
    """A cell without its middle where it would push the others off the screen."""
    half = _WIDEST_CELL // 2
    return cell if len(cell) <= _WIDEST_CELL else f"{cell[: half - 2]}...{cell[1 - half :]}"


def cosine(value: float | None) -> str:
    """Six digits; 1 means 1, whatever the rounding."""
    if value is None or not math.isfinite(value) or abs(value) >= 1:
        return number(value)
    return f"{max(min(value, 0.999999), -0.999999):.6f}"
