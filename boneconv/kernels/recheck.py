"""Single elements of a BAT merge, recomputed: in float64, then without error.

Weights and blocks of at most float32 make every product exact in float64, so that an element is a
sum of r + 2 float64 terms: `math.fsum` of them, and of them and its own result, decides any
rounding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from boneconv.config import Axis
from boneconv.dtypes import F32, F64
from boneconv.kernels.expansion import Pairs
from boneconv.kernels.general import GeneralMerger
from boneconv.kernels.narrow import FORMATS, HalfFormat, widen
from boneconv.kernels.rounding import BITS, decide, decide_pair
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array, Stage, rank_of

__all__ = ["Recheck"]

_AT_ONCE = 1 << 15
_FEW = 64
_UNDERFLOW = 2.0**-900  # what a tiny scale may lose
_UP = 1 + 2.0**-20


class _Part(NamedTuple):
    """Rows of the weight, and the blocks that they meet.

    Attributes:
        rows: ``[n, in]``.
        first_row: The weight's row that ``rows[0]`` is.
        columns: Row number * r + k is column k of a block.
        first_block: The block that ``columns`` starts with.
    """

    rows: Array
    first_row: int
    columns: Array
    first_block: int


class Recheck:
    """Settles elements that a faster computation left in doubt.

    Args:
        stage: A BAT update with a block of at most float32.
        target: The dtype to round to.
    """

    def __init__(self, stage: Stage, target: np.dtype[Any]) -> None:
        self._stage = stage
        self._rank = rank_of(stage)
        self._target = target
        self._general = GeneralMerger([stage], target)
        self._columns = _by_column(stage.block) if stage.axis is Axis.IN else None

    @property
    def nbytes(self) -> int:
        """The work space that `settle` takes, at most, with what it allocates."""
        return 24 * max(_AT_ONCE, self._rank)

    def settle(
        self,
        rows: Array,
        first_row: int,
        where: Array,
        product: float,
        out: Array,
        scratch: Scratch,
    ) -> None:
        """Store the canonical values of the elements at flat indices ``where``.

        Args:
            rows: ``[n, in]``, at most float32, finite.
            first_row: The weight's row that ``rows[0]`` is.
            where: Flat indices into ``rows``.
            product: A bound on |tile of a row| |column of its block| for these elements.
            out: ``[n, in]`` of the target dtype.
            scratch: Work space.
        """
        bits = out.view(BITS[self._target])
        part = self._part(rows, first_row)
        at_once = max(1, _AT_ONCE // self._rank)
        for start in range(0, len(where), at_once):
            chosen = where[start : start + at_once]
            left = chosen[self._in_double(part, chosen, product, bits, scratch)]
            if len(left) and self._stage.scale == 1.0:
                self._without_error(part, left, bits, scratch)
            elif len(left):
                self._by_rows(rows, first_row, left, out)

    def _part(self, rows: Array, first_row: int) -> _Part:
        if self._columns is not None:
            return _Part(rows, first_row, self._columns, 0)
        first = first_row // self._rank
        last = (first_row + len(rows) - 1) // self._rank
        return _Part(rows, first_row, _by_column(self._stage.block[first : last + 1]), first)

    def _in_double(
        self, part: _Part, where: Array, product: float, bits: Array, scratch: Scratch
    ) -> Array:
        """Store what float64 decides; the indices into ``where`` of what it does not."""
        weights, columns, ends = self._terms(part, where, scratch)
        values = np.vecdot(weights, columns)
        values += ends[0]
        values += ends[1]
        largest = float(np.abs(ends).max())
        bound = (self._rank + 6) * 2.0**-53 * (product + 2 * largest) * _UP
        if self._stage.scale != 1.0:
            bound += _UNDERFLOW
        if self._target == F32:
            rounded, undecided = decide(values, np.full(len(values), bound), F32)
        else:
            rounded, undecided = _decide_half(values, bound, FORMATS[self._target])
        bits.reshape(-1)[where] = rounded
        return np.flatnonzero(undecided)

    def _without_error(self, part: _Part, where: Array, bits: Array, scratch: Scratch) -> None:
        weights, columns, ends = self._terms(part, where, scratch)
        weights *= columns
        terms = np.concatenate([weights, ends.T], axis=1)
        flat = bits.reshape(-1)
        if len(where) > _FEW:
            pairs = Pairs.exactly(np.zeros(len(where)))
            for term in np.ascontiguousarray(terms.T):
                pairs.add(term)
            pairs = pairs.normalised()
            decision = decide_pair(pairs.high, pairs.low, pairs.bound, self._target)
            flat[where] = decision.bits
            where, terms = where[decision.undecided], terms[decision.undecided]
        if len(where):
            high, low = np.array([_exact_sum(line) for line in terms.tolist()]).T
            flat[where] = decide_pair(high, low, np.zeros_like(high), self._target).bits

    def _by_rows(self, rows: Array, first_row: int, where: Array, out: Array) -> None:
        """With a scale, products are not exact in float64: whole rows, the general way."""
        for i in np.unique(where // rows.shape[1]).tolist():
            self._general.merge(rows[i : i + 1], first_row + i, out[i : i + 1])

    def _terms(self, part: _Part, where: Array, scratch: Scratch) -> tuple[Array, Array, Array]:
        """Tiles' rows and blocks' columns ``[elements, r]``; block elements and weights."""
        r = self._rank
        tiles, k = np.divmod(where, r)
        i, tile = np.divmod(tiles, part.rows.shape[1] // r)
        row = part.first_row + i
        block = (row // r if self._stage.axis is Axis.OUT else tile) - part.first_block
        weights = scratch.take("weights", (len(where), r), F64)
        columns = scratch.take("columns", (len(where), r), F64)
        gathered = part.rows.reshape(-1, r).take(tiles, axis=0)
        np.copyto(weights, widen(gathered, scratch, "gathered"))
        np.copyto(columns, part.columns.take(block * r + k, axis=0))
        if self._stage.scale != 1.0:
            np.multiply(columns, self._stage.scale, out=columns)
        at = np.arange(len(where))
        return weights, columns, np.stack([columns[at, row % r], weights[at, k]])


def _by_column(blocks: Array) -> Array:
    """``[blocks, r, r] -> [blocks * r, r]``, float32, a row for each column."""
    columns = np.ascontiguousarray(blocks.transpose(0, 2, 1), np.float32)
    return columns.reshape(-1, blocks.shape[-1])


def _decide_half(values: Array, bound: float, form: HalfFormat) -> tuple[Array, Array]:
    """Float64 values to bits of a 16-bit format, and where the bound leaves that open."""
    single = values.astype(np.float32)
    aligned = np.abs(form.align(single, single)).view(np.uint32)
    fraction = np.uint32(form.fraction)
    lower = aligned >> fraction
    between = (lower << fraction) | np.uint32(1 << (form.fraction - 1))
    midpoints = between.view(np.float32).astype(np.float64) / form.scale
    beyond = np.abs(values) - midpoints
    lower += beyond > 0
    lower |= (values < 0).astype(np.uint32) << np.uint32(15)
    undecided = (np.abs(beyond) <= bound) | (np.abs(values) <= bound)
    return lower.astype(np.uint16), undecided


def _exact_sum(terms: list[float]) -> tuple[float, float]:
    """The sum rounded to float64, and the rest rounded to float64 (zero only if it is zero)."""
    total = math.fsum(terms)
    return total, math.fsum([*terms, -total])
