"""``boneconv unmerge``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from boneconv.cli import options
from boneconv.cli.console import Bar, echo_json, note, one_line, size, table

if TYPE_CHECKING:
    from boneconv.unmerging import RestoredTensor, UnmergeResult

__all__ = ["command"]

_LAYER = re.compile(r"^(.*?)\.\d+\.(.+)$")


@click.command("unmerge", short_help="Restore the base of a merged checkpoint.")
@click.argument("merged")
@click.argument("adapter")
@click.argument("out", type=click.Path())
@options.more_adapters("A further adapter, in the order of the merge; may be repeated.")
@click.option(
    "--delta", metavar="FILE", help="What `merge --keep-delta` wrote: restores every byte."
)
@click.option(
    "--scale",
    type=float,
    metavar="S",
    help="The merge's scale, where MERGED has no boneconv.json.  [default: 1]",
)
@options.workers
@options.force
@options.as_json()
@options.quiet
@options.verbose("every restored tensor")
def command(
    merged: str,
    adapter: str,
    out: str,
    more: tuple[str, ...],
    delta: str | None,
    scale: float | None,
    workers: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Take ADAPTER out of MERGED and write the base to OUT.

    MERGED is what `boneconv merge` wrote. The merge rounded every weight; without the delta file
    the result is as near to the base as that allows, and the bound on the difference is printed.

    Example: boneconv unmerge ./merged ./my-bone-adapter ./base-again --delta ./merged.delta
    """
    from boneconv.unmerging import unmerge

    bar = Bar("unmerging", quiet=quiet)
    try:
        result = unmerge(
            merged,
            adapter,
            out,
            more=more,
            delta=delta,
            scale=scale,
            workers=workers,
            force=force,
            progress=bar,
        )
    finally:
        bar.close()
    for text in result.notes:
        note(text, quiet=quiet)
    echo_json(_json(result)) if as_json else click.echo(_text(result, verbose))


def _json(result: UnmergeResult) -> dict[str, Any]:
    return {
        "out": str(result.out),
        "record": str(result.record),
        "tensors": result.counts,
        "exact": result.exact,
        "bound": result.worst_bound,
        "condition": result.worst_condition,
        "restored": [asdict(each) for each in result.restored],
        "bytes": result.nbytes,
        "left_out": list(result.left_out),
        "notes": list(result.notes),
    }


def _text(result: UnmergeResult, verbose: bool) -> str:
    counts = ", ".join(f"{count} {word}" for word, count in result.counts.items() if count)
    lines = [one_line(f"{result.out}: {counts}, {size(result.nbytes)}")]
    if result.left_out:
        lines.append(one_line(f"left out    {', '.join(result.left_out)}"))
    if result.exact:
        lines.append("exact       every tensor is the base's, by its digest")
    else:
        lines.append(f"bound       no weight differs from the base's by more than {_bound(result)}")
    lines.append(f"condition   at most {result.worst_condition:.3g} (norm of column sums)")
    if result.restored:
        rows = [("tensor", "bound", "condition", "exact")]
        rows += [_row([each.name], [each]) for each in result.restored] if verbose else []
        rows += [] if verbose else [_row([k, f"x{len(v)}"], v) for k, v in _kinds(result)]
        lines += ["", table(rows)]
    return "\n".join(lines)


def _bound(result: UnmergeResult) -> str:
    return f"{result.worst_bound:.3g}"


def _row(name: Sequence[str], found: Sequence[RestoredTensor]) -> tuple[str, str, str, str]:
    """One tensor, or the worst of several of a kind."""
    conditions = [each.condition for each in found if each.condition is not None]
    known = [each.exact for each in found if each.exact is not None]
    return (
        " ".join(name),
        f"{max(each.bound for each in found):.3g}",
        f"{max(conditions):.3g}" if conditions else "-",
        f"{sum(known)} of {len(found)}" if known else "-",
    )


def _kinds(result: UnmergeResult) -> list[tuple[str, list[RestoredTensor]]]:
    """The tensors by kind: those that differ in the number of their layer alone."""
    kinds: dict[str, list[RestoredTensor]] = defaultdict(list)
    for each in result.restored:
        match = _LAYER.match(each.name)
        kinds[f"{match[1]}.*.{match[2]}" if match else each.name].append(each)
    return list(kinds.items())
