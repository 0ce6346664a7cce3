"""``boneconv inspect``."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from boneconv.cli import options
from boneconv.cli.console import echo_json, one_line, size, table

if TYPE_CHECKING:
    from boneconv.inspection import AdapterSummary, BlockSummary, CheckpointSummary

__all__ = ["command"]

_LAYER = re.compile(r"^(.*?)\.(\d{1,9})\.(.+)$")


@click.command("inspect", short_help="Show what an adapter or a checkpoint holds.")
@click.argument("path")
@options.as_json("summary")
@options.verbose("every module of an adapter")
def command(path: str, as_json: bool, verbose: bool) -> None:
    """Show what an adapter or a checkpoint holds. Only headers are read.

    Example: boneconv inspect ./my-bone-adapter
    """
    from boneconv.inspection import AdapterSummary, inspect

    summary = inspect(path)
    if as_json:
        echo_json({**asdict(summary), "path": str(summary.path)})
    elif isinstance(summary, AdapterSummary):
        click.echo(_adapter(summary, verbose))
    else:
        click.echo(_checkpoint(summary))


def _adapter(summary: AdapterSummary, verbose: bool) -> str:
    lines = [
        f"adapter     {summary.path}",
        f"format      {summary.format}",
        f"variant     {_variant(summary)}, rank {_ranks(summary)}, {', '.join(summary.dtypes)}",
        f"base        {summary.base or 'not named'}",
        *([f"fingerprint {summary.fingerprint}"] if summary.fingerprint else []),
        *([f"scale       {summary.scale:g}"] if summary.scale != 1.0 else []),
        f"modules     {len(summary.blocks)}",
        f"parameters  {summary.parameters:,}",
    ]
    if summary.saved:
        lines.append(f"replaces    {', '.join(summary.saved)}")
    if summary.unknown_fields:
        lines.append(f"unknown     {', '.join(summary.unknown_fields)} (kept, not understood)")
    lines = [one_line(line) for line in lines]
    if summary.blocks:
        lines += ["", _modules(summary) if verbose else _layers(summary)]
    return "\n".join(lines)


def _variant(summary: AdapterSummary) -> str:
    return summary.variant + (f" over the {summary.axis}put axis" if summary.axis else "")


def _ranks(summary: AdapterSummary) -> str:
    lowest = min((block.rank for block in summary.blocks), default=summary.rank)
    return str(summary.rank) if lowest == summary.rank else f"{lowest} to {summary.rank}"


def _modules(summary: AdapterSummary) -> str:
    rows = [("module", "rank", "block", "dtype", "parameters")]
    rows += [
        (b.module, str(b.rank), _shape(b), b.dtype, f"{b.parameters:,}") for b in summary.blocks
    ]
    return table(rows)


def _layers(summary: AdapterSummary) -> str:
    """A row for each kind of module: in which layers, with which block."""
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    for block in summary.blocks:
        match = _LAYER.match(block.module)
        name = f"{match[1]}.*.{match[3]}" if match else block.module
        key = name, _shape(block), block.dtype
        groups[key] += [int(match[2])] if match else []
        counts[key] += block.parameters
    rows = [("module", "layers", "block", "dtype", "parameters")]
    rows += [
        (name, _ranges(layers), shape, dtype, f"{counts[name, shape, dtype]:,}")
        for (name, shape, dtype), layers in groups.items()
    ]
    return table(rows)


def _ranges(numbers: list[int]) -> str:
    """``0-3, 5`` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "-"


def _shape(block: BlockSummary) -> str:
    return "x".join(map(str, block.shape))


def _checkpoint(summary: CheckpointSummary) -> str:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sorted(summary.dtypes.items()))
    lines = [
        f"checkpoint  {summary.path}",
        f"tensors     {summary.tensors} ({dtypes})",
        f"parameters  {summary.parameters:,}",
        f"weights     {size(summary.nbytes)}",
    ]
    if summary.side_files:
        lines.append(f"beside      {', '.join(summary.side_files)}")
    if summary.left_out:
        lines.append(f"stale       {', '.join(summary.left_out)} (a merge leaves these out)")
    rows = [("shard", "tensors", "size")]
    rows += [(s.name, str(s.tensors), size(s.nbytes)) for s in summary.shards]
    return "\n".join([*map(one_line, lines), "", table(rows)])
