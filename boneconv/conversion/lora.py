"""LoRA factors of an update: exact for Bone and mini, the best of a rank for BAT.

With dW = W' - W ``[out, in]``, LoRA stores ``lora_A [R, in]`` and ``lora_B [out, R]`` and adds
``alpha / R * lora_B @ lora_A``.

Bone, B ``[r, out]``: ``dW[:, j] = B[j mod r, :]``; ``lora_B = B^T``, and ``lora_A[i, j] = 1`` where
``j mod r = i``, else 0. mini is the same with B tiled along out. Rows beyond r are zero.

BAT has no exact factors short of full rank. With the eigenvectors U of ``dW dW^T`` (or V of
``dW^T dW``, whichever is smaller), ``U_k U_k^T dW`` is the closest matrix of rank k (Eckart and
Young). All is done in float64, in bands: dW itself, which may be wide, is never held as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from boneconv.config import Axis, Variant
from boneconv.errors import NonFiniteError
from boneconv.kernels import Stage
from boneconv.kernels.reference import delta
from boneconv.kernels.stage import Array, check_stage, rank_of

__all__ = ["Factors", "Spectrum", "approximate", "exact", "needed_rank", "spectrum"]

Doubles = npt.NDArray[np.float64]

#: Bytes of float64 in one band of dW.
_BAND = 64 * 1024 * 1024


@dataclass(frozen=True)
class Factors:
    """The LoRA of one module.

    Attributes:
        lora_a: ``[R, in]``, of the block's dtype.
        lora_b: ``[out, R]``, of the block's dtype.
        error: ``|dW - lora_B lora_A|_F / |dW|_F`` of these rounded factors, in float64.
    """

    lora_a: Array
    lora_b: Array
    error: float


@dataclass(frozen=True)
class Spectrum:
    """The squared singular values of an update.

    Attributes:
        squares: Descending; as many as the smaller side is long.
        vectors: The singular vectors of the smaller side, as columns in the same order.
        total: Their sum, ``|dW|_F^2``.
    """

    squares: Doubles
    vectors: Doubles
    total: float


def exact(stage: Stage, shape: tuple[int, int], rank: int) -> Factors:
    """The factors of a Bone or mini update of a weight ``[out, in]``, padded to a rank.

    Raises:
        ShapeError: The block does not fit the weight.
        NonFiniteError: The block holds NaN or infinity.
    """
    check_stage(stage, shape)
    (rows, columns), own = shape, rank_of(stage)
    block = stage.block
    if stage.variant is Variant.MINI:
        block = np.tile(block, (1, rows // block.shape[1]))
    lora_a: Array = np.zeros((rank, columns), block.dtype)
    lora_a[np.arange(columns) % own, np.arange(columns)] = 1
    lora_b: Array = np.zeros((rows, rank), block.dtype)
    lora_b[:, :own] = block.T
    return Factors(lora_a, lora_b, 0.0)


def spectrum(weight: Array, stage: Stage, *, vectors: bool = True) -> Spectrum:
    """The singular values of BAT's update, from the Gram matrix of dW's smaller side.

    Args:
        weight: ``[out, in]``.
        stage: The update; its scale counts.
        vectors: Whether to compute the singular vectors too, which takes about three times as long.

    Raises:
        ShapeError: The block does not fit the weight.
        NonFiniteError: The block or the weight holds NaN or infinity.
    """
    check_stage(stage, (weight.shape[0], weight.shape[1]))
    rows, columns = weight.shape
    gram = np.zeros((min(rows, columns),) * 2)
    by_rows = columns < rows
    for band in _bands(weight, stage, by_rows=by_rows):
        change = band.delta()
        gram += change.T @ change if by_rows else change @ change.T
    if not np.isfinite(gram).all():
        raise NonFiniteError("the update holds NaN or infinity")
    if vectors:
        values, own = np.linalg.eigh(gram)
    else:
        values, own = np.linalg.eigvalsh(gram), np.empty((0, 0))
    squares = np.maximum(values[::-1], 0.0)
    return Spectrum(squares, own[:, ::-1], float(np.trace(gram)))


def needed_rank(found: Spectrum, energy: float) -> int:
    """The smallest rank that retains a share of the sum of squared singular values."""
    kept = np.cumsum(found.squares)
    return int(min(np.searchsorted(kept, energy * kept[-1]) + 1, len(kept)))


def approximate(weight: Array, stage: Stage, found: Spectrum, kept: int, rank: int) -> Factors:
    """The best factors of rank ``kept`` of BAT's update, padded with zeros to ``rank``.

    Both factors get the square roots of the singular values, so that half precision holds them;
    the error is measured after they were rounded to the block's dtype.

    Raises:
        NonFiniteError: A factor overflows the block's dtype.
    """
    rows, columns = weight.shape
    kept = min(kept, rows, columns)
    by_rows = columns < rows
    basis = found.vectors[:, :kept]
    image = np.empty((kept, rows if by_rows else columns))
    for band in _bands(weight, stage, by_rows=by_rows):
        change = band.delta()
        image[:, band.place] = (change @ basis).T if by_rows else basis.T @ change
    roots = np.sqrt(np.sqrt(np.einsum("kn,kn->k", image, image)))
    safe = np.where(roots > 0, roots, 1.0)
    outer, inner = basis * roots, image / safe[:, None]
    small, large = (outer.T, inner) if by_rows else (inner, outer.T)
    lora_a = _padded(small, rank, stage.block.dtype)
    lora_b = _padded(large, rank, stage.block.dtype).T
    left = _residual(weight, stage, lora_a, lora_b, by_rows=by_rows)
    error = math.sqrt(left / found.total) if found.total > 0 else 0.0
    return Factors(lora_a, np.ascontiguousarray(lora_b), error)


def _residual(weight: Array, stage: Stage, lora_a: Array, lora_b: Array, *, by_rows: bool) -> float:
    """``|dW - lora_B lora_A|_F^2``."""
    a, b = lora_a.astype(np.float64), lora_b.astype(np.float64)
    left = 0.0
    for band in _bands(weight, stage, by_rows=by_rows):
        part = b[band.place] @ a if by_rows else b @ a[:, band.place]
        left += float(np.square(band.delta() - part).sum())
    return left


def _padded(factor: Doubles, rank: int, dtype: np.dtype[Any]) -> Array:
    padded: Array = np.zeros((rank, factor.shape[1]), dtype)
    with np.errstate(over="ignore"):
        padded[: len(factor)] = factor.astype(dtype)
    if not np.isfinite(padded.astype(np.float64)).all():
        raise NonFiniteError(f"a LoRA factor overflows {dtype}")
    return padded


@dataclass(frozen=True)
class _Band:
    """Consecutive rows, or columns, of W and the blocks that belong to them."""

    place: slice
    weight: Array
    stage: Stage

    def delta(self) -> Doubles:
        """This part of dW."""
        return self.stage.scale * delta(self.weight, self.stage)


def _bands(weight: Array, stage: Stage, *, by_rows: bool) -> Iterator[_Band]:
    """W cut into bands of whole tiles along one axis."""
    along, across = weight.shape if by_rows else weight.shape[::-1]
    r = rank_of(stage)
    step = max(r, _BAND // (8 * across) // r * r)
    own_axis = stage.axis is (Axis.OUT if by_rows else Axis.IN)
    for start in range(0, along, step):
        place = slice(start, min(along, start + step))
        part = weight[place] if by_rows else weight[:, place]
        blocks = stage.block[place.start // r : place.stop // r] if own_axis else stage.block
        yield _Band(place, part, replace(stage, block=blocks))
