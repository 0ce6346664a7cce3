"""Undoing merges: the inverse blocks, their bits, the bound on what comes back."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import blake3
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from boneconv.config import Axis, Variant
from boneconv.dtypes import BF16, F16, F32, F64
from boneconv.errors import InputError, NonFiniteError
from boneconv.kernels import RowMerger, Scratch, Stage, exact
from boneconv.kernels.inverse import InverseMerger, Measures, half_ulp, inverse_stage
from tests.kernels.cases import DTYPES, bits, merged, merges
from tests.kernels.other_orders import reversed_products


def _bat(block: Any, scale: float = 1.0, **options: Any) -> Stage:
    return Stage(Variant.BAT, np.asarray(block), Axis.OUT, scale, **options)


def _random_bat(n: int, r: int, size: float, seed: int = 0) -> Stage:
    rng = np.random.default_rng(seed)
    return _bat((rng.standard_normal((n, r, r)) * size).astype(np.float32))


def _exact_inverse(matrix: Any) -> list[list[Fraction]]:
    """Gauss-Jordan in rational arithmetic."""
    r = len(matrix)
    rows = [[Fraction(float(v)) for v in row] for row in matrix]
    rows = [row + [Fraction(i == j) for j in range(r)] for i, row in enumerate(rows)]
    for k in range(r):
        pivot = next(i for i in range(k, r) if rows[i][k])
        rows[k], rows[pivot] = rows[pivot], rows[k]
        rows[k] = [value / rows[k][k] for value in rows[k]]
        for i in range(r):
            if i != k:
                factor = rows[i][k]
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k], strict=True)]
    return [row[r:] for row in rows]


def _column_norm(matrix: Any) -> Any:
    return max(sum(abs(value) for value in column) for column in zip(*matrix, strict=True))


def _elementwise(factor: Any) -> Any:
    """inverse(I + factor) - I by the same elimination, one Python float at a time."""
    r = len(factor)
    a = [[float(v) for v in row] for row in factor]
    for i in range(r):
        a[i][i] += 1.0
    swaps = []
    for k in range(r):
        pivot = max(range(k, r), key=lambda i: (abs(a[i][k]), -i))
        swaps.append(pivot)
        a[k], a[pivot] = a[pivot], a[k]
        head = a[k][k]
        a[k][k] = 1.0
        a[k] = [value / head for value in a[k]]
        for i in range(r):
            if i != k:
                scale = a[i][k]
                a[i][k] = 0.0
                a[i] = [x - scale * y for x, y in zip(a[i], a[k], strict=True)]
    for k in reversed(range(r)):
        for row in a:
            row[k], row[swaps[k]] = row[swaps[k]], row[k]
    for i in range(r):
        a[i][i] += -1.0
    return np.asarray(a)


# --- the inverse --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
def test_the_inverse_block_is_near_the_exact_one_within_its_bound(size: float) -> None:
    stage = _random_bat(3, 4, size)
    for target in DTYPES:
        found = inverse_stage(stage, target, bounded=True)
        missing = growth = Fraction(0)
        for block, inverse in zip(stage.block, found.stage.block, strict=True):
            true = _exact_inverse(np.eye(4) + block.astype(np.float64))
            growth = max(growth, _column_norm(true))
            error = [
                [t - (i == j) - Fraction(float(inverse[i, j])) for j, t in enumerate(row)]
                for i, row in enumerate(true)
            ]
            missing = max(missing, _column_norm(error))
        assert missing <= found.missing <= 1e-6 * found.growth**2
        assert growth <= found.growth <= float(growth) * 1.001


def test_the_bits_of_the_inverse_are_those_of_plain_float_arithmetic() -> None:
    for r, seed in ((1, 0), (2, 1), (5, 2), (16, 3)):
        stage = _random_bat(6, r, 0.8, seed)
        found = inverse_stage(stage, F64, bounded=False).stage
        for block, inverse in zip(stage.block, found.block, strict=True):
            expected = _elementwise(block.astype(np.float64))
            assert np.array_equal(bits(inverse), bits(expected))


def test_many_blocks_are_inverted_in_groups() -> None:
    stage = _random_bat(40, 64, 0.01)
    whole = inverse_stage(stage, F32, bounded=False).stage.block
    for k in (0, 15, 16, 39):
        single = inverse_stage(replace(stage, block=stage.block[k : k + 1]), F32, bounded=False)
        assert np.array_equal(bits(whole[k]), bits(single.stage.block[0]))


def test_the_condition_number_is_that_of_the_worst_block() -> None:
    stage = _random_bat(5, 6, 0.4)
    found = inverse_stage(stage, BF16, bounded=False)
    expected = [np.linalg.cond(np.eye(6) + block.astype(np.float64), 1) for block in stage.block]
    assert found.condition == pytest.approx(max(expected))


def test_bone_and_mini_change_their_sign_and_need_no_bound() -> None:
    block = np.asarray([[1.5, -3.0]], np.float32)
    for variant in (Variant.BONE, Variant.MINI):
        found = inverse_stage(Stage(variant, block, scale=0.3, residue=1e-20), BF16, bounded=True)
        assert found.stage == Stage(variant, block, scale=-0.3, residue=-1e-20)
        assert (found.condition, found.growth, found.missing) == (1.0, 1.0, 0.0)
        assert found.addend >= 0.9


@pytest.mark.parametrize("target", [BF16, F16])
def test_an_inverse_beyond_float32_stays_in_float64(target: np.dtype[Any]) -> None:
    stage = _bat(np.full((1, 1, 1), np.ldexp(1.0, -140) - 1, np.float64))
    assert stage.block[0, 0, 0] == -1  # 2**-140 is lost: singular
    with pytest.raises(InputError, match="singular"):
        inverse_stage(stage, target, bounded=False)
    blocks = np.asarray([[[-1.0, 2.0**-140], [2.0**-140, -1.0]]])
    found = inverse_stage(_bat(blocks), target, bounded=False)
    assert found.stage.block.dtype == F64
    assert found.stage.block[0, 0, 1] == 2.0**140


# --- singular blocks ----------------------------------------------------------------------------


def test_a_singular_block_is_named_by_its_number() -> None:
    block = _random_bat(20, 4, 0.1).block
    block[17] = -np.eye(4)
    for bounded in (True, False):
        with pytest.raises(InputError, match=r"I \+ B is singular in its block 17"):
            inverse_stage(_bat(block), BF16, bounded=bounded)


def test_the_scale_decides_whether_a_block_is_singular() -> None:
    block = -2 * np.eye(3, dtype=np.float32)[None]
    assert inverse_stage(_bat(block), BF16, bounded=True).condition < 1.001
    with pytest.raises(InputError, match="singular"):
        inverse_stage(_bat(block, 0.5), BF16, bounded=True)
    with pytest.raises(InputError, match="singular"):
        inverse_stage(_bat(block, 0.25, residue=0.25), BF16, bounded=True)


def test_a_block_too_near_to_singular_has_no_bound() -> None:
    block = np.asarray([[[0.0, 1.0], [1.0, 2.0**-60]]])  # I + B = [[1, 1], [1, 1 + 2**-60]]
    with pytest.raises(InputError, match="or too close to it"):
        inverse_stage(_bat(block), F32, bounded=True)
    ill = np.asarray([[[0.0, 1.0], [1.0, 2.0**-51]]])
    with pytest.raises(InputError, match="or too close to it"):
        inverse_stage(_bat(ill), F32, bounded=True)
    assert inverse_stage(_bat(ill), F32, bounded=False).condition > 2.0**51


# --- the way back -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_a_unit_in_the_last_place(dtype: np.dtype[Any]) -> None:
    info: Any = ml_dtypes.finfo(dtype)
    tiny, one = float(info.smallest_subnormal), float(info.eps)
    assert half_ulp(1.0, dtype) == one / 2
    assert half_ulp(np.nextafter(1.0, 0), dtype) == one / 4
    assert half_ulp(float(info.max), dtype) == one * 2.0 ** (int(info.maxexp) - 1) / 2
    assert half_ulp(0.0, dtype) == half_ulp(tiny, dtype) == tiny / 2


def _there_and_back(
    weight: Any, stages: list[Stage], middle: np.dtype[Any]
) -> tuple[Any, Measures] | None:
    """The restored weight and its measures; None where a range or a block makes it impossible."""
    try:
        there = merged(RowMerger(stages, weight.shape, weight.dtype, middle), weight, middle)
        back = np.empty_like(weight)
        merger = InverseMerger(stages, weight.shape, middle, weight.dtype)
        measures = merger.merge(there, 0, back, Scratch())
    except InputError:
        return None
    return back, measures


@given(merges())
@settings(max_examples=150)
def test_what_comes_back_is_within_the_bound(case: tuple[Any, list[Stage], Any]) -> None:
    weight, stages, middle = case
    found = _there_and_back(weight, stages, middle)
    if found is None:
        return
    back, measures = found
    worst = max(
        abs(Fraction(float(a)) - Fraction(float(b)))
        for a, b in zip(back.flat, weight.flat, strict=True)
    )
    assert worst <= measures.bound
    assert measures.condition >= 1.0


def test_bone_comes_back_within_a_unit_in_the_last_place_of_the_merged_weight() -> None:
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((64, 96)) * 0.02).astype(BF16)
    stage = Stage(Variant.BONE, (rng.standard_normal((10, 64)) * 1e-3).astype(np.float32))
    found = _there_and_back(weight, [stage], BF16)
    assert found is not None
    back, measures = found
    largest = np.abs(merged(RowMerger([stage], weight.shape, BF16, BF16), weight, BF16)).max()
    assert measures.bound <= 2.0001 * half_ulp(float(largest), BF16)
    assert (back == weight).mean() > 0.9


@given(merges(stages=1))
@settings(max_examples=60)
def test_bone_and_mini_come_back_as_the_exact_difference_rounded_once(
    case: tuple[Any, list[Stage], Any],
) -> None:
    weight, stages, middle = case
    if stages[0].variant is Variant.BAT:
        return
    backwards = [replace(stages[0], scale=-stages[0].scale)]
    with np.errstate(all="ignore"):
        rows = weight.astype(middle)
    if not np.isfinite(rows).all():
        return
    out = np.empty(rows.shape, weight.dtype)
    merger = InverseMerger(stages, rows.shape, middle, weight.dtype)
    try:
        expected = exact.merge(rows, backwards, weight.dtype)
    except OverflowError:
        with pytest.raises(NonFiniteError, match="the base cannot be restored"):
            merger.merge(rows, 0, out, Scratch())
        return
    merger.merge(rows, 0, out, Scratch())
    assert np.array_equal(bits(out), bits(expected))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("axis", list(Axis))
def test_bat_comes_back_as_the_canonical_merge_of_the_inverse_block(
    axis: Axis, dtype: np.dtype[Any]
) -> None:
    rng = np.random.default_rng(2)
    stage = replace(_random_bat(4, 4, 0.1), axis=axis, scale=0.7)
    rows = (rng.standard_normal((16, 16)) * 0.02).astype(dtype)
    out = np.empty_like(rows)
    InverseMerger([stage], rows.shape, dtype, dtype).merge(rows, 0, out, Scratch())
    inverse = inverse_stage(stage, dtype, bounded=False).stage
    assert np.array_equal(bits(out), bits(exact.merge(rows, [inverse], dtype)))


def test_stages_are_undone_backwards() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((8, 8)).astype(np.float64)
    stages = [
        _random_bat(2, 4, 0.3, 1),
        Stage(Variant.BONE, rng.standard_normal((4, 8)).astype(np.float32)),
        _random_bat(2, 4, 0.3, 2),
    ]
    found = _there_and_back(weight, stages, F64)
    assert found is not None
    assert np.abs(found[0] - weight).max() <= found[1].bound < 1e-12


def test_another_order_of_summation_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    stages = [_random_bat(2, 48, 0.05, 5)]
    for dtype in (BF16, F16, F32):
        rows = (rng.standard_normal((96, 192)) * 0.02).astype(dtype)
        before, after = np.empty_like(rows), np.empty_like(rows)
        InverseMerger(stages, rows.shape, dtype, dtype, bounded=False).merge(
            rows, 0, before, Scratch()
        )
        with monkeypatch.context() as patch:
            calls = reversed_products(patch)
            InverseMerger(stages, rows.shape, dtype, dtype, bounded=False).merge(
                rows, 0, after, Scratch()
            )
        assert calls
        assert np.array_equal(bits(before), bits(after))


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [
        (BF16, "ee723f8cfe4f93c2"),
        (F16, "3f3c199fe03882a2"),
        (F32, "71e1d5c78c82e970"),
    ],
)
def test_delta_files_of_version_1_rely_on_these_bits(dtype: np.dtype[Any], digest: str) -> None:
    """Another result here makes every delta file useless: give the format a new version."""
    count = np.arange(48 * 96, dtype=np.float64)
    rows = (np.modf(count * 0.6180339887498949)[0] - 0.5).reshape(48, 96).astype(dtype)
    block = (np.modf(count[: 3 * 16 * 16] * 0.7548776662466927)[0] - 0.5) / 4
    stage = _bat(block.reshape(3, 16, 16).astype(np.float32), 0.75)
    out = np.empty_like(rows)
    InverseMerger([stage], rows.shape, dtype, dtype, bounded=False).merge(rows, 0, out, Scratch())
    assert blake3.blake3(out.tobytes()).hexdigest()[:16] == digest
