"""Comparing many tensors with several workers, in memory that does not depend on their size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from boneconv.digest import tensor_digest
from boneconv.engine.workers import Place, can_fork, run_queues, usable_cores
from boneconv.verification.measures import Measures, together
from boneconv.verification.pairs import Heads, Pair, Part, Worker, tasks_of

__all__ = ["Found", "compare_pairs"]


@dataclass(frozen=True)
class Found:
    """What was found of one tensor.

    Attributes:
        measures: Of all its elements.
        heads: Digests of its first bytes; None where it is empty.
        base: The digest of what it is merged into; None where it is not wanted.
    """

    measures: Measures
    heads: Heads | None
    base: str | None = None


def compare_pairs(
    groups: Sequence[Sequence[Pair]],
    *,
    workers: int | None,
    advance: Callable[[int], None],
) -> Mapping[str, Found]:
    """Compares pairs, group by group (those of one file).

    Args:
        groups: The pairs; names are unique over all of them.
        workers: How many workers; None for one on each usable core.
        advance: Is told how many bytes of the candidate were compared.

    Returns:
        What was found, by the planned tensor's name.

    Raises:
        NonFiniteError: The base or an adapter holds NaN or infinity, or a merged value overflows.
        FormatError, MachineError: Reading failed.
    """
    queues = [tasks_of(pairs) for pairs in groups]
    by_name = {pair.planned.name: pair for pairs in groups for pair in pairs}
    parts: dict[str, dict[int, Part]] = {name: {} for name in by_name}

    def on_done(place: Place, part: Part) -> None:
        segment = queues[place[0]][place[1]].segment
        parts[segment.tensor.name][segment.first_row] = part
        advance(segment.nbytes)

    run_queues(
        [len(queue) for queue in queues],
        lambda: Worker(queues),
        on_done,
        workers or usable_cores(),
        processes=can_fork(),
    )
    return {name: _joined(by_name[name], found) for name, found in parts.items()}


def _joined(pair: Pair, parts: Mapping[int, Part]) -> Found:
    ordered = [parts[first] for first in sorted(parts)]
    measures = together([part.measures for part in ordered])
    leaves = [leaf for part in ordered for leaf in part.leaves]
    source = pair.planned.source
    base = tensor_digest(source.dtype, source.shape, leaves) if leaves else None
    return Found(measures, ordered[0].heads if ordered else None, base)
