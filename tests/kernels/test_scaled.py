"""Float8 weights with scales: dequantised exactly, merged, and rounded once."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boneconv.config import Variant
from boneconv.dtypes import FLOAT8S
from boneconv.errors import NonFiniteError
from boneconv.kernels import Scratch, Stage
from boneconv.kernels.exact import round_fraction
from boneconv.kernels.scaled import ScaledMerger, ScaleGrid
from tests.builders import BF16, F16, F32, F64, Array

TARGETS = [BF16, F16, F32]
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
SHAPE = (11, 13)


def _eights(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Finite values of every exponent."""
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[~np.isfinite(codes.view(dtype).astype(F64))] = 0x81
    return codes.view(dtype)


def _spread(scales: Array, block: tuple[int, int], shape: tuple[int, int]) -> Array:
    return scales.repeat(block[0], 0).repeat(block[1], 1)[: shape[0], : shape[1]]


def _run(merger: ScaledMerger, rows: Array, target: np.dtype[Any], step: int) -> Array:
    out = np.empty(rows.shape, target)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        merger.merge(rows[part], first, out[part], Scratch())
    return out


def _bits(array: Array) -> list[Any]:
    return array.view(f"u{array.dtype.itemsize}").tolist()


@pytest.mark.parametrize("dtype", FLOAT8S.values(), ids=FLOAT8S)
@pytest.mark.parametrize("target", TARGETS, ids=str)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 15), step=st.integers(1, 11))
def test_every_element_is_the_exact_value_rounded_once(
    dtype: np.dtype[Any], target: np.dtype[Any], seed: int, rank: int, step: int
) -> None:
    """Blocks that take the sum to halfway between two outputs, or just beside it, are among them.

    The float32 of such a sum is halfway itself, whichever side the exact value is on.
    """
    rng = np.random.default_rng(seed)
    block = tuple(int(n) for n in rng.integers(1, 9, 2))
    rows = _eights(rng, dtype, SHAPE)
    scales = rng.uniform(-1, 1, (-(-11 // block[0]), -(-13 // block[1]))).astype(F32)
    scales = scales.astype(F64) * 2.0 ** int(rng.integers(-20, -3))
    values = rows.astype(F64) * _spread(scales, block, SHAPE)
    update = (rng.standard_normal((rank, 11)) * 2.0 ** int(rng.integers(-20, 3))).astype(F32)
    for k in range(rank):
        if k < 13 and rng.integers(2):
            near = values[:, k].astype(target)
            above = np.nextafter(near, np.asarray(np.inf, target)).astype(F64)
            update[k] = ((near.astype(F64) + above) / 2 - values[:, k]).astype(F32)
            aside = np.asarray([-np.inf, np.inf], F32)[rng.integers(0, 2, 11)]
            update[k] = np.where(rng.integers(0, 2, 11), np.nextafter(update[k], aside), update[k])
    grid = ScaleGrid(scales, 11, block, 13)
    merger = ScaledMerger(grid, [Stage(Variant.BONE, update)], SHAPE, target)
    found = _run(merger, rows, target, step)
    wanted = np.empty(SHAPE, target)
    for i, j in np.ndindex(*SHAPE):
        exact = Fraction(float(values[i, j])) + Fraction(float(update[j % rank, i]))
        wanted[i, j] = round_fraction(exact, target)
    assert _bits(found) == _bits(wanted)
    plain = _run(ScaledMerger(grid, [], SHAPE, target), rows, target, step)
    for i, j in np.ndindex(*SHAPE):
        exact = Fraction(float(values[i, j]))
        assert plain[i, j] == round_fraction(exact, target)
        assert np.signbit(plain[i, j]) == np.signbit(values[i, j])


def test_exact_zeros_of_a_merge_are_positive_and_those_of_a_cast_keep_their_sign() -> None:
    rows = np.full((2, 3), 0x80, np.uint8).view(E4M3)
    grid = ScaleGrid(np.ones((1, 1)), 2, (2, 3), 3)
    for target in TARGETS:
        stage = Stage(Variant.BONE, np.full((1, 2), -0.0, F32))
        assert not np.signbit(
            _run(ScaledMerger(grid, [stage], (2, 3), target), rows, target, 2)
        ).any()
        assert np.signbit(_run(ScaledMerger(grid, [], (2, 3), target), rows, target, 2)).all()


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_nan_is_refused_by_a_merge_and_passes_a_cast(target: np.dtype[Any]) -> None:
    rows = np.full((2, 3), 0x7F, np.uint8).view(E4M3)
    grid = ScaleGrid(np.ones((1, 1)), 2, (2, 3), 3)
    stage = Stage(Variant.BONE, np.ones((1, 2), F32))
    with pytest.raises(NonFiniteError, match="row 0, column 0"):
        _run(ScaledMerger(grid, [stage], (2, 3), target), rows, target, 2)
    assert np.isnan(_run(ScaledMerger(grid, [], (2, 3), target), rows, target, 2)).all()


def test_values_near_and_beyond_the_range_of_float16() -> None:
    rows = np.full((1, 4), 448.0).astype(E4M3)
    for scale, value in ((146.0, 65408.0), (147.0, None)):
        merger = ScaledMerger(ScaleGrid(np.full((1, 1), scale), 1, (1, 4), 4), [], (1, 4), F16)
        if value is None:
            with pytest.raises(NonFiniteError, match="range of float16"):
                _run(merger, rows, F16, 1)
        else:
            assert _run(merger, rows, F16, 1).tolist() == [[value] * 4]
