"""Undoing a merge: the update that leads from a merged weight back to its base.

Bone and mini, W' = W + S B, are undone by the same block with the scale -S. BAT multiplies every
row of an r x r tile: with A = I + S B, ``W' + I = (W + I) A`` within the tile, so that

    W = W' + W' @ C + C,    C = inverse(A) - I,

which is BAT again, with the block C. Undoing any merge is therefore a merge, and its result is
canonical: the exact value of the formula above, rounded once.

C itself is computed by Gauss-Jordan elimination with partial pivoting, in float64 or, for 16-bit
bases, rounded to float32. Every operation is elementwise, in a fixed order, so that the bits of C
are the same on every machine and with every BLAS. How far C is from the exact inverse is bounded
afterwards from its residual: with ``R = -(S B + C + S B C)`` and the norm ``|X|`` of largest
absolute column sum, ``|R| < 1`` proves A regular and the error at most
``|I + C| |R| / (1 - |R|)`` (Rump, "Verification methods", Acta Numerica 19, 2010).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from boneconv.dtypes import BF16, F16, F32, F64
from boneconv.errors import InputError, NonFiniteError
from boneconv.kernels.rounding import largest_magnitude
from boneconv.kernels.rows import RowMerger
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array, Stage, check_stage, is_bat

__all__ = ["Inverse", "InverseMerger", "Measures", "half_ulp", "inverse_stage"]

#: dtype -> (significand bits, smallest normal exponent)
_FORMATS = {BF16: (8, -126), F16: (11, -14), F32: (24, -126), F64: (53, -1022)}

_UNIT = 2.0**-53
_UP = 1 + 2.0**-40  # covers the rounding of norms and bounds
_TINY = 2.0**-1000  # covers underflow
_GROUP = 1 << 16  # elements that are eliminated at a time: 512 KiB


class Measures(NamedTuple):
    """What is known of the restored elements of some rows; combined by the larger of each.

    Attributes:
        bound: No element differs from the base's by more; 0 where it was not asked for.
        condition: The largest condition number, in the norm of absolute column sums, of a block
            I + S B; 1 for Bone and mini.
    """

    bound: float
    condition: float


@dataclass(frozen=True)
class Inverse:
    """The update that undoes one stage.

    Attributes:
        stage: Merging it restores what the stage was merged into.
        condition: The largest condition number of a block; 1 for Bone and mini.
        growth: How much an error of the weight grows at most: the norms of inverse(A) and I + C
            are no larger.
        missing: The largest norm of the error of C.
        addend: The largest magnitude of what is added whatever the weight is.
    """

    stage: Stage
    condition: float = 1.0
    growth: float = 1.0
    missing: float = 0.0
    addend: float = 0.0


def half_ulp(magnitude: float, dtype: np.dtype[Any]) -> float:
    """Half a unit in the last place of a finite number; of the smallest normal one below that."""
    bits, lowest = _FORMATS[np.dtype(dtype)]
    exponent = max(math.frexp(magnitude)[1] - 1, lowest) if magnitude else lowest
    return math.ldexp(1.0, exponent - bits)


def inverse_stage(stage: Stage, target: np.dtype[Any], *, bounded: bool) -> Inverse:
    """What undoes a stage.

    Args:
        stage: The checked update that was merged.
        target: The dtype of the base.
        bounded: Whether to bound the error of C. The stage and the condition number do not depend
            on it.

    Raises:
        InputError: A block I + S B is singular, or so close to it that its inverse cannot be
            bounded (which is only looked at where ``bounded``).
    """
    if is_bat(stage):
        return _inverse_bat(stage, target, bounded=bounded)
    largest = float(np.max(np.abs(stage.block.astype(np.float64)), initial=0.0))
    addend = largest * (abs(stage.scale) + abs(stage.residue)) * _UP
    undone = replace(stage, scale=-stage.scale, residue=-stage.residue)
    return Inverse(undone, addend=addend)


def _inverse_bat(stage: Stage, target: np.dtype[Any], *, bounded: bool) -> Inverse:
    block = stage.block
    inverse = np.empty(block.shape, F64)
    conditions, missings = [1.0], [0.0]
    step = max(1, _GROUP // (block.shape[1] * block.shape[2]))
    for first in range(0, len(block), step):
        part = slice(first, first + step)
        with np.errstate(all="ignore"):
            wide = block[part].astype(F64)
            factor = wide * stage.scale + wide * stage.residue
            conditions.append(_invert(factor, inverse[part], first))
            if bounded:
                missings.append(_missing(factor, inverse[part], first))
    used: Array = inverse
    missing = max(missings)
    if target in (BF16, F16):
        with np.errstate(over="ignore"):
            single = inverse.astype(F32)
        if np.isfinite(single).all():
            used = single
            missing += float(_norms(single.astype(F64) - inverse).max(initial=0.0))
    return Inverse(
        replace(stage, block=used, scale=1.0, residue=0.0),
        max(conditions),
        (float(_norms(_plus_identity(inverse)).max(initial=1.0)) + missing) * _UP,
        missing * _UP,
        float(np.abs(used).max(initial=0.0)),
    )


def _invert(factor: Array, out: Array, first: int) -> float:
    """Writes C for the blocks S B ``[n, r, r]``; returns the largest condition number."""
    matrix = _plus_identity(factor)
    norms = _norms(matrix)
    _gauss_jordan(matrix)
    regular = np.isfinite(matrix).all(axis=(1, 2))
    if not regular.all():
        raise _singular(first + int(np.argmin(regular)))
    norms *= _norms(matrix)
    out[...] = _plus_identity(matrix, -1.0)
    return float(norms.max(initial=1.0))


def _gauss_jordan(a: Array) -> None:
    """Inverts matrices ``[n, r, r]`` in place; those that are singular get infinities or NaN."""
    n, r, _ = a.shape
    each = np.arange(n)
    work = np.empty_like(a)
    swaps = []
    for k in range(r):
        pivot = k + np.argmax(np.abs(a[:, k:, k]), axis=1)
        swaps.append(pivot)
        row = a[each, pivot]  # a copy, [n, r]
        a[each, pivot] = a[:, k]
        head = row[:, k, None].copy()
        row[:, k] = 1.0
        row /= head
        factors = a[:, :, k, None].copy()
        a[:, :, k] = 0.0
        np.multiply(factors, row[:, None, :], out=work)
        np.subtract(a, work, out=a)
        a[:, k] = row
    for k in reversed(range(r)):
        column = a[:, :, k].copy()
        a[:, :, k] = a[each, :, swaps[k]]
        a[each, :, swaps[k]] = column


def _missing(factor: Array, inverse: Array, first: int) -> float:
    """The largest bound on ``|exact C - C|`` for blocks S B and C ``[n, r, r]``, from the residual.

    The residual's own rounding is bounded for any order of summation: r products, two sums, and
    the rounding of S B, itself a sum of two products.
    """
    residual = np.abs(factor + inverse + factor @ inverse)
    steps = (factor.shape[1] + 8) * _UNIT
    f, c = _norms(factor), _norms(inverse)
    rho = (_norms(residual) + steps * (f * c + f + c)) * _UP + _TINY
    if not (rho < 0.5).all():
        raise _singular(first + int(np.argmin(rho < 0.5)))
    bounds = _norms(_plus_identity(inverse)) * rho / (1 - rho) * _UP
    return float(bounds.max(initial=0.0))


def _plus_identity(matrices: Array, number: float = 1.0) -> Array:
    result = matrices.copy()
    index = np.arange(matrices.shape[1])
    result[:, index, index] += number
    return result


def _norms(matrices: Array) -> Array:
    """The largest absolute column sum of each matrix, summed in a fixed order: ``[n]``."""
    total = np.zeros((len(matrices), matrices.shape[2]))
    for k in range(matrices.shape[1]):
        total += np.abs(matrices[:, k])
    return np.asarray(total.max(axis=1, initial=0.0)) * _UP


def _singular(number: int) -> InputError:
    return InputError(
        f"I + B is singular in its block {number}, or too close to it: the merge lost what the "
        "base was",
        hint="Only a delta file that `boneconv merge --keep-delta` wrote can restore the base",
    )


class InverseMerger:
    """From rows of a merged weight to rows of its base, through all stages backwards.

    Every element is the canonical result of merging `inverse_stage` of every stage, the last one
    first. It is not the base's element itself: the merge rounded W', by at most half a unit in the
    last place, which the inverse carries along, and the result is rounded to the base's dtype.

    Args:
        stages: The updates that were merged, in the order of the merge.
        shape: The weight's ``(out, in)``.
        source: The dtype of the merged weight.
        target: The dtype of the base.
        bounded: Whether to bound the difference from the base.

    Raises:
        ConfigError, ShapeError, NonFiniteError: As of `RowMerger`.
        InputError: A block I + S B is singular.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        shape: tuple[int, int],
        source: np.dtype[Any],
        target: np.dtype[Any],
        *,
        bounded: bool = True,
    ) -> None:
        for stage in stages:
            check_stage(stage, shape)
        backwards = reversed(stages)
        self._inverses = [inverse_stage(stage, target, bounded=bounded) for stage in backwards]
        self._source, self._target = np.dtype(source), np.dtype(target)
        self._bounded = bounded
        self._merger = RowMerger([each.stage for each in self._inverses], shape, source, target)
        self.row_multiple = self._merger.row_multiple
        self.condition = max((each.condition for each in self._inverses), default=1.0)

    def preferred_rows(self) -> int:
        """How many rows to hand over at a time."""
        return self._merger.preferred_rows()

    def merge(self, rows: Array, first_row: int, out: Array, scratch: Scratch) -> Measures:
        """Restore consecutive rows ``[n, in]``; the arguments are those of `RowMerger.merge`.

        Raises:
            NonFiniteError: A weight is not finite, or its base is beyond the target's range.
        """
        try:
            self._merger.merge(rows, first_row, out, scratch)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"the base cannot be restored: {error.message}", found=error.found
            ) from error
        bound = self._bound(rows, out) if self._bounded else 0.0
        return Measures(bound, self.condition)

    def _bound(self, rows: Array, out: Array) -> float:
        """A bound on the difference of any element of ``out`` from the base's.

        An error e of all elements of x becomes ``(x + e + I) inverse(A) - (x + I)(I + C)`` =
        ``e inverse(A) + (x + I)(inverse(A) - I - C)``. The last rounding adds at most half a unit
        in the last place of the result, and at most the error so far, since the base's element is
        a number of the target's format too.
        """
        reach = largest_magnitude(rows)
        error = half_ulp(reach, self._source)
        for inverse in self._inverses:
            error = (error * inverse.growth + (reach + 1) * inverse.missing) * _UP
            reach = (reach * inverse.growth + inverse.addend) * _UP
        return (error + min(error, half_ulp(largest_magnitude(out), self._target))) * _UP
