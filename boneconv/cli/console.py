"""What commands share: progress on stderr, results on stdout, sizes for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from boneconv.errors import printable

__all__ = ["Bar", "echo_json", "note", "one_line", "size", "table"]


class Bar:
    """A progress bar on stderr: none when stderr is no terminal, none below two seconds."""

    def __init__(self, description: str, *, quiet: bool) -> None:
        self._description = description
        self._disable = quiet or not sys.stderr.isatty()
        self._bar: Any = None

    def start(self, total: int) -> None:
        """Begins with the number of bytes to come."""
        if self._disable:
            return
        self.close()
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread of its own: the workers are forked
        self._bar = tqdm(
            total=total,
            desc=self._description,
            unit="B",
            unit_scale=True,
            delay=2,
            leave=False,
            file=sys.stderr,
        )

    def advance(self, nbytes: int) -> None:
        """Adds bytes that are done."""
        if self._bar is not None:
            self._bar.update(nbytes)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()


def echo_json(value: Any) -> None:
    """Writes a result for machines."""
    click.echo(json.dumps(value, indent=2))


def note(text: str, *, quiet: bool = False) -> None:
    """Writes a remark to stderr."""
    if not quiet:
        click.echo(one_line(text), err=True)


def one_line(text: str) -> str:
    """A text that may hold a stranger's names, with all that a terminal would obey escaped."""
    return printable(text).replace("\n", "\\n")


def size(nbytes: float) -> str:
    """Bytes for people: 1.5 GB (10^9)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def table(rows: Sequence[Sequence[str]], *, indent: str = "") -> str:
    """Rows in columns; a column of numbers is aligned to the right."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [
        all(row[i].lstrip("-")[:1].isdigit() or row[i] in ("", "-") for row in rows[1:])
        for i in range(len(widths))
    ]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)
