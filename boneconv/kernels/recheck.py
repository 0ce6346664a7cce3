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
from boneconv.kernels.narrow import FORMATS, HalfFormat
from boneconv.kernels.rounding import BITS, decide, decide_pair
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array, Stage, rank_of

__all__ = ["Recheck"]

_AT_ONCE = 3 << 14  # terms: at rank 64, what a chunk of the usual size leaves in doubt
_FEW = 64
_UNDERFLOW = 2.0**-900  # what a tiny scale may lose
_UP = 1 + 2.0**-20


class _Part(NamedTuple):
    """Rows of the weight, and the blocks that they meet.

    Attributes:
        rows: ``[n, in]`` float32.
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
        size: float,
        out: Array,
        scratch: Scratch,
    ) -> None:
        """Store the canonical values of the elements at flat indices ``where``.

        Args:
            rows: ``[n, in]`` float32, finite.
            first_row: The weight's row that ``rows[0]`` is.
            where: Flat indices into ``rows``.
            size: A bound, for these elements, on |tile of a row| |column of its block|, Euclidean
                norms, plus |weight| and |block element|.
            out: ``[n, in]`` of the target dtype.
            scratch: Work space.
        """
        bits = out.view(BITS[self._target])
        part = self._part(rows, first_row)
        at_once = max(1, _AT_ONCE // self._rank)
        for start in range(0, len(where), at_once):
            chosen = where[start : start + at_once]
            left = chosen[self._in_double(part, chosen, size, bits, scratch)]
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
        self, part: _Part, where: Array, size: float, bits: Array, scratch: Scratch
    ) -> Array:
        """Store what float64 decides; the indices into ``where`` of what it does not."""
        weights, columns, ends = self._terms(part, where, scratch)
        values = np.vecdot(weights, columns)
        for end in ends:
            values += end
        bound = (self._rank + 6) * 2.0**-53 * size * _UP
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
        terms = np.concatenate([weights, np.stack(ends, axis=1)], axis=1)
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

    def _terms(
        self, part: _Part, where: Array, scratch: Scratch
    ) -> tuple[Array, Array, tuple[Array, Array]]:
        """Tiles' rows and blocks' columns ``[elements, r]``; block elements and weights."""
        r = self._rank
        tiles, k = np.divmod(where, r)
        i, tile = np.divmod(tiles, part.rows.shape[1] // r)
        number, row = np.divmod(i + part.first_row, r)
        block = number if self._stage.axis is Axis.OUT else tile
        column = (block - part.first_block) * r + k
        weights = _gathered(part.rows, tiles, "weights", r, scratch)
        columns = _gathered(part.columns, column, "columns", r, scratch)
        if self._stage.scale != 1.0:
            np.multiply(columns, self._stage.scale, out=columns)
        at = np.arange(0, len(where) * r, r)
        return weights, columns, (columns.take(at + row), weights.take(at + k))


def _by_column(blocks: Array) -> Array:
    """``[blocks, r, r] -> [blocks * r, r]``, float32, a row for each column."""
    columns = np.ascontiguousarray(blocks.transpose(0, 2, 1), np.float32)
    return columns.reshape(-1, blocks.shape[-1])


def _gathered(values: Array, lines: Array, name: str, r: int, scratch: Scratch) -> Array:
    """Lines of ``values``, seen as ``[n, r]``, as float64."""
    shape = (len(lines), r)
    single = scratch.take("gathered", shape, F32)
    values.reshape(-1, r).take(lines, axis=0, out=single, mode="clip")
    double = scratch.take(name, shape, F64)
    np.copyto(double, single)
    return double


def _decide_half(values: Array, bound: float, form: HalfFormat) -> tuple[Array, Array]:
    """Float64 values to bits of a 16-bit format, and where the bound leaves that open."""
    magnitudes = np.abs(values)
    single = magnitudes.astype(np.float32)
    fraction = np.uint32(form.fraction)
    lower = form.align(single, single).view(np.uint32) >> fraction
    between = (lower << fraction) | np.uint32(1 << (form.fraction - 1))
    beyond = magnitudes - between.view(np.float32) / np.float64(form.scale)
    lower += beyond > 0
    lower |= np.signbit(values).astype(np.uint32) << np.uint32(15)
    undecided = np.minimum(np.abs(beyond, out=beyond), magnitudes) <= bound
    return lower.astype(np.uint16), undecided


def _exact_sum(terms: list[float]) -> tuple[float, float]:
    """The sum rounded to float64, and the rest rounded to float64 (zero only if it is zero)."""
    total = math.fsum(terms)
    return total, math.fsum([*terms, -total])
