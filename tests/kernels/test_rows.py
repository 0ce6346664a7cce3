from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from boneconv.config import Axis, Variant
from boneconv.dtypes import BF16, F16, F32, F64
from boneconv.errors import ConfigError, NonFiniteError, ShapeError
from boneconv.kernels import RowMerger, Scratch, Stage, exact, products
from boneconv.kernels.reference import apply
from tests.kernels.cases import (
    DTYPES,
    FORMULAS,
    ROUNDINGS,
    adversarial,
    bits,
    merged,
    merges,
    stage_of,
    values,
)


@given(merges())
@settings(max_examples=600, deadline=None)
def test_every_element_is_the_exact_value_rounded_once(case) -> None:
    weight, stages, target = case
    before = [bits(a).copy() for a in (weight, *(s.block for s in stages))]
    merger = RowMerger(stages, weight.shape, weight.dtype, target)
    try:
        expected = exact.merge(weight, stages, target)
    except OverflowError:
        with pytest.raises(NonFiniteError, match="beyond the range"):
            merged(merger, weight, target)
        return
    found = merged(merger, weight, target)
    assert np.array_equal(bits(found), bits(expected))
    after = [bits(a) for a in (weight, *(s.block for s in stages))]
    assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(("source", "target", "block"), ROUNDINGS)
@pytest.mark.parametrize(("variant", "axis"), FORMULAS)
@pytest.mark.parametrize("kind", ["normal", "few bits", "mixed", "subnormal"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_weights_of_some_size_equal_rational_arithmetic(
    variant: Variant, axis: Axis, source, target, block, kind: str, scale: float
) -> None:
    """Ranks beyond 32, where sums are split; thousands of elements, where many are in doubt."""
    rng = np.random.default_rng(5)
    shape = (48, 96)
    stage = stage_of(variant, axis, shape, 48, rng=rng, kind=kind, dtype=block, scale=scale)
    weight = values(kind, shape, source, rng)
    found = merged(RowMerger([stage], shape, source, target), weight, target)
    rows = rng.choice(48, 3, replace=False)
    for i in rows.tolist():
        for j in range(shape[1]):
            value = exact.round_fraction(exact.element(weight, i, j, [stage]), target)
            expected = np.array([value]).astype(target)
            assert int(bits(found)[i, j]) == int(bits(expected)[0]), (i, j)


@pytest.mark.parametrize(("source", "target", "block"), ROUNDINGS)
@pytest.mark.parametrize(("variant", "axis"), FORMULAS)
def test_a_million_weights_are_all_the_nearest(
    variant: Variant, axis: Axis, source, target, block
) -> None:
    """Against float64 sums that share no code: no neighbour may be nearer to the true value."""
    rng = np.random.default_rng(6)
    shape = (512, 256)  # x 8 roundings x 4 formulas = 4 million
    stage = stage_of(variant, axis, shape, 64, rng=rng, dtype=block)
    weight = (rng.standard_normal(shape) * 0.02).astype(source)
    found = merged(RowMerger([stage], shape, source, target), weight, target)
    assert misrounded(found, weight, stage) == 0


def misrounded(found, weight, stage: Stage) -> int:
    """How many elements are not the nearest; doubtful ones are asked of rational arithmetic."""
    true = apply(weight, [stage])
    as_float = found.astype(np.float64)
    error = np.abs(as_float - true)
    unsigned = bits(found)
    step = unsigned.dtype.type(1)
    wrong = np.zeros(found.shape, bool)
    doubtful = np.zeros(found.shape, bool)
    for neighbour in (unsigned + step, unsigned - step):
        other = np.abs(neighbour.view(found.dtype).astype(np.float64) - true)
        other = np.where(np.isfinite(other), other, np.inf)
        doubtful |= np.abs(other - error) <= 1e-12
        wrong |= other < error - 1e-12
    for i, j in np.argwhere(doubtful & ~wrong).tolist():
        value = exact.round_fraction(exact.element(weight, i, j, [stage]), found.dtype)
        wrong[i, j] = value != float(found[i, j])
    return int(wrong.sum())


@pytest.mark.parametrize(
    ("variant", "target", "at_least"),
    [(Variant.BAT, BF16, 1), (Variant.BAT, F16, 5)],
)
def test_plain_accumulation_misrounds_what_the_canonical_merge_does_not(
    variant: Variant, target, at_least: int
) -> None:
    rng = np.random.default_rng(7)
    shape = (512, 512)
    stage = stage_of(variant, Axis.OUT, shape, 64, rng=rng)
    weight = (rng.standard_normal(shape) * 0.02).astype(target)
    canonical = merged(RowMerger([stage], shape, target, target), weight, target)
    plain_merger = RowMerger([stage], shape, target, target, canonical=False)
    plain = merged(plain_merger, weight, target)
    different = int((bits(plain) != bits(canonical)).sum())
    assert at_least <= different <= 1e-3 * weight.size
    np.testing.assert_allclose(plain.astype(F64), canonical.astype(F64), rtol=0.01, atol=1e-6)


@given(merges())
@settings(max_examples=60, deadline=None)
def test_plain_accumulation_is_close(case) -> None:
    weight, stages, target = case
    with np.errstate(all="ignore"):
        true = apply(weight, stages)
        scale = apply(np.abs(weight.astype(F64)), [_magnitude(s) for s in stages])
    if not np.isfinite(scale).all() or scale.max() > 1e4 or scale.max() < 1e-4:
        return
    merger = RowMerger(stages, weight.shape, weight.dtype, target, canonical=False)
    found = merged(merger, weight, target)
    unit = {BF16: 2.0**-8, F16: 2.0**-10, F32: 2.0**-22, F64: 2.0**-46}[target]
    assert (np.abs(found.astype(F64) - true) <= unit * scale.max()).all()


def _magnitude(stage: Stage) -> Stage:
    return Stage(stage.variant, np.abs(stage.block.astype(F64)), stage.axis, abs(stage.scale))


@pytest.mark.parametrize(("source", "target", "block"), ROUNDINGS)
@pytest.mark.parametrize(("variant", "axis"), FORMULAS)
def test_the_bytes_do_not_depend_on_chunks_or_threads(
    variant: Variant, axis: Axis, source, target, block
) -> None:
    rng = np.random.default_rng(8)
    shape = (192, 320)
    stage = stage_of(variant, axis, shape, 32, rng=rng, dtype=block, kind="mixed")
    weight = values("mixed", shape, source, rng)
    merger = RowMerger([stage], shape, source, target)
    whole = merged(merger, weight, target)
    for rows in (32, 64, 96):
        assert np.array_equal(bits(merged(merger, weight, target, rows)), bits(whole))
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(merged, merger, weight, target, 32) for _ in range(4)]
    assert all(np.array_equal(bits(run.result()), bits(whole)) for run in runs)


def reversed_product(a, b, out=None):
    """A matrix product by another order of summation, as another BLAS would have it."""
    total = a[..., :, -1:] * b[..., -1:, :]
    for k in reversed(range(a.shape[-1] - 1)):
        total = total + a[..., :, k : k + 1] * b[..., k : k + 1, :]
    out[...] = total
    return out


def pairwise_product(a, b, out=None):
    out[...] = np.einsum("...ik,...kj->...ij", a, b)
    return out


class OtherNumpy:
    """numpy, but for one function."""

    def __init__(self, matmul) -> None:
        self.matmul = matmul

    def __getattr__(self, name: str):
        return getattr(np, name)


@pytest.mark.parametrize(("source", "target", "block"), ROUNDINGS)
@pytest.mark.parametrize("axis", list(Axis))
@pytest.mark.parametrize("other", [reversed_product, pairwise_product])
def test_the_bytes_do_not_depend_on_the_order_of_summation(
    axis: Axis, source, target, block, other, monkeypatch
) -> None:
    rng = np.random.default_rng(9)
    shape = (128, 256)
    stage = stage_of(Variant.BAT, axis, shape, 64, rng=rng, dtype=block)
    weight = (rng.standard_normal(shape) * 0.02).astype(source)
    merger = RowMerger([stage], shape, source, target)
    plain = RowMerger([stage], shape, source, target, canonical=False)
    expected, plainly = merged(merger, weight, target), merged(plain, weight, target)
    monkeypatch.setattr(products, "np", OtherNumpy(other))
    assert np.array_equal(bits(merged(merger, weight, target)), bits(expected))
    if (
        other is reversed_product and target == F16
    ):  # the plain merge does depend on it: the comparison is not idle
        assert not np.array_equal(bits(merged(plain, weight, target)), bits(plainly))


@pytest.mark.parametrize(("source", "target", "block_dtype"), ROUNDINGS)
@pytest.mark.parametrize(("name", "weight", "block"), adversarial())
def test_adversarial_weights(source, target, block_dtype, name: str, weight, block) -> None:
    weight, block = weight.astype(source), block.astype(block_dtype)
    for variant, part in ((Variant.BAT, block), (Variant.BONE, block[0])):
        stage = Stage(variant, part)
        merger = RowMerger([stage], weight.shape, source, target)
        found = merged(merger, weight, target)
        rows = [0, 7, 15]
        known = [
            [exact.round_fraction(exact.element(weight, i, j, [stage]), target) for j in range(64)]
            for i in rows
        ]
        assert np.array_equal(bits(found)[rows], bits(np.array(known).astype(target))), name


def test_a_sum_that_is_zero_is_plus_zero() -> None:
    weight = np.array([[-0.0, 1.5, -1.5, -0.0]], F32)
    stage = Stage(Variant.BONE, np.array([[-0.0], [-1.5], [1.5], [0.0]], np.float32))
    for target in DTYPES:
        found = merged(RowMerger([stage], (1, 4), F32, target), weight, target)
        assert not bits(found).any()


def test_underflow_is_gradual_and_keeps_the_sign() -> None:
    weight = np.array([[2.0**-24, -(2.0**-25), -(2.0**-26), 3 * 2.0**-25]], np.float32)
    stage = Stage(Variant.BONE, np.zeros((1, 1), np.float32))
    found = merged(RowMerger([stage], (1, 4), F32, F16), weight, F16)
    assert bits(found).tolist() == [[0x0001, 0x8000, 0x8000, 0x0002]]


@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(source, canonical: bool, bad: float) -> None:
    weight = np.ones((8, 6), source)
    weight[5, 4] = bad
    stage = Stage(Variant.BONE, np.zeros((2, 8), np.float32))
    merger = RowMerger([stage], (8, 6), source, BF16, canonical=canonical)
    with pytest.raises(NonFiniteError, match="row 5, column 4 is not finite"):
        merged(merger, weight, BF16, rows=4)


@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize(("variant", "shape"), [(Variant.BONE, (2, 8)), (Variant.BAT, (4, 2, 2))])
def test_overflow_is_an_error_that_names_the_place(canonical: bool, variant, shape) -> None:
    weight = np.ones((8, 6), F32)
    weight[5, 4] = 65519  # rounds to the largest float16, 65504
    stage = Stage(variant, np.zeros(shape, np.float32))
    merger = RowMerger([stage], (8, 6), F32, F16, canonical=canonical)
    assert float(merged(merger, weight, F16)[5, 4]) == 65504
    weight[5, 4] = 65520
    with pytest.raises(NonFiniteError, match=r"row 5, column 4 is beyond the range of float16"):
        merged(merger, weight, F16)


def test_values_near_the_largest_are_merged() -> None:
    weight = np.full((2, 4), np.finfo(np.float32).max, np.float32)
    stage = Stage(Variant.BAT, np.full((1, 2, 2), -0.25, np.float32))
    found = merged(RowMerger([stage], (2, 4), F32, F32), weight, F32)
    assert np.array_equal(found, exact.merge(weight, [stage], F32))


def test_stages_apply_in_order() -> None:
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    bone = Stage(Variant.BONE, np.ones((2, 4), np.float32))
    bat = Stage(Variant.BAT, np.ones((2, 2, 2), np.float32))
    one = merged(RowMerger([bone, bat], (4, 4), F32, F32), weight, F32)
    other = merged(RowMerger([bat, bone], (4, 4), F32, F32), weight, F32)
    assert np.array_equal(one, apply(weight, [bone, bat]))
    assert np.array_equal(other, apply(weight, [bat, bone]))
    assert not np.array_equal(one, other)


def test_no_stage_is_a_cast() -> None:
    weight = np.array([[1 + 2.0**-8 + 2.0**-40, -2.0]])
    assert merged(RowMerger([], (1, 2), F64, BF16), weight, BF16).tolist() == [[1 + 2.0**-7, -2.0]]


def test_rows_are_taken_in_whole_row_blocks() -> None:
    def merger(*stages: Stage, columns: int = 24) -> RowMerger:
        return RowMerger(stages, (24, columns), BF16, BF16)

    def bat(r: int, axis: Axis) -> Stage:
        return Stage(Variant.BAT, np.ones((24 // r, r, r), np.float32), axis)

    bone = Stage(Variant.BONE, np.ones((5, 24), np.float32))
    assert merger(bone).row_multiple == 1
    assert merger(bat(4, Axis.IN)).row_multiple == 1
    assert merger(bat(4, Axis.OUT)).row_multiple == 4
    assert merger(bat(4, Axis.OUT), bone, bat(6, Axis.OUT)).row_multiple == 12
    assert merger(bat(4, Axis.OUT)).preferred_rows() % 4 == 0
    assert merger(bone, columns=10**7).preferred_rows() == 1
    assert merger(bone, columns=2048).preferred_rows() == 64


def test_shapes_and_dtypes_are_checked() -> None:
    stage = Stage(Variant.BONE, np.ones((2, 7), np.float32))
    with pytest.raises(ShapeError):
        RowMerger([stage], (8, 8), BF16, BF16)
    with pytest.raises(ConfigError, match="int32"):
        RowMerger([], (8, 8), np.dtype(np.int32), BF16)
    block = np.ones((2, 8), np.float32)
    block[1, 1] = np.inf
    with pytest.raises(NonFiniteError):
        RowMerger([Stage(Variant.BONE, block)], (8, 8), BF16, BF16)


@pytest.mark.parametrize(("source", "target", "block"), ROUNDINGS)
@pytest.mark.parametrize(("variant", "axis"), FORMULAS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_work_space_is_what_was_predicted(
    variant: Variant, axis: Axis, source, target, block, scale: float
) -> None:
    rng = np.random.default_rng(11)
    shape = (64, 2048)
    stage = stage_of(variant, axis, shape, 64, rng=rng, dtype=block, scale=scale)
    weight = (rng.standard_normal(shape) * 0.02).astype(source)
    merger = RowMerger([stage], shape, source, target)
    scratch = Scratch()
    merger.merge(weight, 0, np.empty(shape, target), scratch)
    predicted = merger.scratch_nbytes(64)
    assert scratch.nbytes <= predicted <= 16 << 20
    assert merger.nbytes >= stage.block.nbytes


@given(st.integers(1, 70), st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
@example(r=33, seed=0)
@example(r=64, seed=1)
@example(r=65, seed=2)
def test_any_rank(r: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (r, 2 * r)
    weight = (rng.standard_normal(shape) * 0.02).astype(BF16)
    for axis in Axis:
        stage = stage_of(Variant.BAT, axis, shape, r, rng=rng)
        found = merged(RowMerger([stage], shape, BF16, BF16), weight, BF16)
        assert misrounded(found, weight, stage) == 0


@pytest.mark.parametrize("scale", [1e-300, -1e-300, 1e-30])
@pytest.mark.parametrize(("variant", "axis"), FORMULAS)
@pytest.mark.parametrize("target", DTYPES)
def test_a_tiny_scale_still_gives_zero_its_sign(variant, axis: Axis, target, scale: float) -> None:
    rng = np.random.default_rng(14)
    stage = stage_of(variant, axis, (8, 8), 4, rng=rng, kind="tiny", scale=scale)
    weight = values("zero", (8, 8), F32, rng)
    found = merged(RowMerger([stage], (8, 8), F32, target), weight, target)
    assert np.array_equal(bits(found), bits(exact.merge(weight, [stage], target)))
    if scale < 0 and target != F64:
        assert np.signbit(found.astype(F64)).any()


def test_a_weight_without_elements() -> None:
    stage = Stage(Variant.BONE, np.ones((2, 4), np.float32))
    assert merged(RowMerger([stage], (4, 0), BF16, BF16), np.ones((4, 0), BF16), BF16).size == 0


def test_read_only_rows_are_accepted() -> None:
    weight = np.ones((4, 4), BF16)
    weight.setflags(write=False)
    stage = Stage(Variant.BONE, np.ones((2, 4), np.float32))
    assert (merged(RowMerger([stage], (4, 4), BF16, BF16), weight, BF16) == 2).all()
