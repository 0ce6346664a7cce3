"""The canonical merge of anything: any number of stages, any scale, any dtypes.

Each row chunk is computed in float64 with a rigorous running bound of the error. What that leaves
undecided is computed again in float64 pairs that account for every bit lost, and what is still
undecided (as good as nothing) in rational arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from boneconv.config import Axis
from boneconv.errors import NonFiniteError
from boneconv.kernels import exact
from boneconv.kernels.expansion import Pairs, carried, pair_times, two_product, two_sum
from boneconv.kernels.products import tiles_times_blocks
from boneconv.kernels.rounding import BITS, decide, decide_pair, first_nonfinite
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array, Stage, is_bat, rank_of, row_update

__all__ = ["GeneralMerger", "block_update", "overflow"]

_UP = 1 + 2.0**-40  # covers the rounding of bounds
_PAIR_ELEMENTS = 1 << 14
_SAFE_PRODUCT = 2.0**-900


class GeneralMerger:
    """Rows of one weight through all stages, canonical.

    Args:
        stages: Checked updates, in order.
        target: The dtype to round to.
    """

    def __init__(self, stages: Sequence[Stage], target: np.dtype[Any]) -> None:
        self._stages = tuple(stages)
        self._target = target

    def merge(self, rows: Array, first_row: int, out: Array) -> None:
        """Merge finite rows ``[n, in]`` into ``out`` (same shape, target dtype).

        Raises:
            NonFiniteError: A merged value is beyond the target's range.
        """
        with np.errstate(all="ignore"):
            values = rows.astype(np.float64)
            bound = np.zeros_like(values)
            for stage in self._stages:
                values, bound = _step(values, bound, stage, first_row)
            decision = decide(values, bound * _UP, self._target)
            bits = out.view(BITS[self._target])
            bits[...] = decision.bits
            open_rows = np.flatnonzero(decision.undecided.any(axis=1))
            at_once = max(1, _PAIR_ELEMENTS // rows.shape[1])
            for start in range(0, len(open_rows), at_once):
                chosen = open_rows[start : start + at_once]
                self._in_pairs(rows, first_row, chosen, decision.undecided[chosen], bits)
        where = first_nonfinite(out)
        if where is not None:
            i, j = divmod(where, rows.shape[1])
            raise overflow(first_row + i, j, self._target)

    def _in_pairs(
        self, rows: Array, first_row: int, chosen: Array, wanted: Array, bits: Array
    ) -> None:
        """Recompute whole rows in float64 pairs; store the elements that are wanted."""
        pairs = Pairs.exactly(rows[chosen].astype(np.float64))
        for stage in self._stages:
            pairs = _step_pairs(pairs, stage, first_row + chosen)
        decision = decide_pair(pairs.high, pairs.low, pairs.bound, self._target)
        i, j = np.nonzero(wanted)
        bits[chosen[i], j] = decision.bits[i, j]
        i, j = np.nonzero(wanted & decision.undecided)
        _finish_exactly(rows, first_row, self._stages, self._target, (chosen[i], j), bits)


def _finish_exactly(
    rows: Array,
    first_row: int,
    stages: Sequence[Stage],
    target: np.dtype[Any],
    where: tuple[Array, Array],
    bits: Array,
) -> None:
    """Store the elements at ``where`` (rows, columns) by rational arithmetic.

    Raises:
        NonFiniteError: A merged value is beyond the target's range.
    """
    for i, j in zip(*where, strict=True):
        value = exact.element(rows, int(i), int(j), stages, first_row)
        try:
            rounded = exact.round_fraction(value, target)
        except OverflowError as error:
            raise overflow(first_row + int(i), int(j), target) from error
        bits[i, j] = np.asarray(rounded).astype(target).view(BITS[target])


def overflow(row: int, column: int, target: np.dtype[Any]) -> NonFiniteError:
    """The error for a merged value that the target cannot hold."""
    return NonFiniteError(
        f"the merged weight at row {row}, column {column} is beyond the range of {target.name}",
        hint="Write a wider dtype (--dtype float32), or check the adapter and its scale",
    )


def block_update(stage: Stage, first_row: int, shape: tuple[int, ...]) -> Array:
    """The block's own part of the update, as float64 that broadcasts against ``shape``."""
    rows, columns = shape
    if not is_bat(stage):
        tile = row_update(stage, first_row, rows).astype(np.float64)
        return np.asarray(tile[:, np.arange(columns) % tile.shape[1]])
    r = rank_of(stage)
    if stage.axis is Axis.OUT:
        index = np.arange(first_row, first_row + rows)
        return np.tile(stage.block[index // r, index % r].astype(np.float64), (1, columns // r))
    within = np.arange(first_row, first_row + rows) % r
    return stage.block[:, within].astype(np.float64).transpose(1, 0, 2).reshape(rows, columns)


def _step(values: Array, bound: Array, stage: Stage, first_row: int) -> tuple[Array, Array]:
    """One stage in float64: the new values and their error bound."""
    change = block_update(stage, first_row, values.shape)
    error = np.zeros_like(values)
    if is_bat(stage):
        product, error = _product(values, bound, stage, first_row)
        change, lost = two_sum(product, change)
        error += np.abs(lost)
    if stage.scale != 1.0 or stage.residue:
        factor = np.asarray(stage.scale)
        rest = carried(np.abs(change) + error, np.asarray(stage.residue))
        change, lost, missing = two_product(change, factor)
        error = carried(error, factor) + np.abs(lost) + missing + rest
    total, lost = two_sum(values, change)
    return total, (bound + error + np.abs(lost)) * _UP


def _product(values: Array, bound: Array, stage: Stage, first_row: int) -> tuple[Array, Array]:
    """The product values @ blocks and its bound, for any order of summation, with FMA or without.

    ``|fl(x . y) - x . y| <= n u |x| . |y|`` (Jeannerod and Rump 2013), u = 2**-53, plus what the
    values' own bound carries through, plus underflow.
    """
    block = _blocks_of(stage, first_row, len(values))
    first_row %= rank_of(stage)
    magnitude = np.abs(block)
    product = np.empty_like(values)
    error = np.empty_like(values)
    n = rank_of(stage) + 2
    scratch = Scratch()
    tiles_times_blocks(values, block, stage.axis, first_row, product, scratch)
    reach = np.abs(values) * (n * 2.0**-53) + bound
    tiles_times_blocks(reach, magnitude, stage.axis, first_row, error, scratch)
    error *= _UP
    if min(_smallest(values), _smallest(bound)) * _smallest(block) < _SAFE_PRODUCT:
        error += n * 2.0**-1000
    return product, error


def _blocks_of(stage: Stage, first_row: int, count: int) -> Array:
    """The float64 blocks of some rows; over the output axis the first of them comes first."""
    if stage.axis is Axis.IN:
        return stage.block.astype(np.float64)
    r = rank_of(stage)
    return stage.block[first_row // r : (first_row + count - 1) // r + 1].astype(np.float64)


def _smallest(values: Array) -> float:
    """The smallest non-zero magnitude; infinity if there is none."""
    magnitude = np.abs(values)
    return float(np.min(magnitude, initial=np.inf, where=magnitude > 0))


def _step_pairs(pairs: Pairs, stage: Stage, index: Array) -> Pairs:
    """One stage in float64 pairs, for the weight's rows ``index``."""
    change = _change_pairs(pairs, stage, index)
    if stage.scale != 1.0 or stage.residue:
        whole = change.normalised()
        change = pair_times(whole, np.asarray(stage.scale))
        if stage.residue:
            change.add_pairs(pair_times(whole, np.asarray(stage.residue)))
            change = change.normalised()
    change.add_pairs(pairs)
    return change.normalised()


def _change_pairs(pairs: Pairs, stage: Stage, index: Array) -> Pairs:
    shape = pairs.high.shape
    single_rows = [block_update(stage, int(row), (1, shape[1])) for row in index]
    change = Pairs.exactly(np.concatenate(single_rows))
    if not is_bat(stage):
        return change
    r = rank_of(stage)
    tiled = (shape[0], shape[1] // r, r)
    high, low, bound = (part.reshape(tiled) for part in (pairs.high, pairs.low, pairs.bound))
    change = Pairs.exactly(change.high.reshape(tiled))
    for k in range(r):
        factor = _factors(stage, index, k)
        column = Pairs(high[:, :, k, None], low[:, :, k, None], bound[:, :, k, None])
        change.add_product(column.high, factor)
        if column.low.any():
            change.add_product(column.low, factor)
        if column.bound.any():
            change.bound = change.bound + carried(column.bound, factor)
    return Pairs(*(part.reshape(shape) for part in (change.high, change.low, change.bound)))


def _factors(stage: Stage, index: Array, k: int) -> Array:
    """Row k of each tile's block, broadcasting against ``[rows, tiles, r]``."""
    if stage.axis is Axis.OUT:
        rows = stage.block[index // rank_of(stage), k]
        return np.asarray(rows[:, None, :], np.float64)
    return np.asarray(stage.block[None, :, k], np.float64)
