from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from boneconv.config import Axis, Variant
from boneconv.dtypes import BF16, F16, F32
from boneconv.errors import NonFiniteError
from boneconv.kernels import RowMerger, Stage
from boneconv.kernels.torch_rows import TorchRowMerger
from tests.kernels.cases import (
    FORMULAS,
    ROUNDINGS,
    adversarial,
    bits,
    merged,
    merges,
    stage_of,
    values,
)

cuda = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = ["cpu", cuda]


@pytest.fixture(autouse=True)
def _cuda_or_skip(request: pytest.FixtureRequest) -> None:
    wanted = request.node.get_closest_marker("cuda") is not None
    if wanted and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def assert_same(weight, stages, target, device: str) -> None:
    expected = merged(RowMerger(stages, weight.shape, weight.dtype, target), weight, target)
    merger = TorchRowMerger(stages, weight.shape, weight.dtype, target, device=device)
    assert np.array_equal(bits(merged(merger, weight, target)), bits(expected))


@given(merges())
@settings(max_examples=200, deadline=None)
def test_the_bytes_are_those_of_the_numpy_merge(case) -> None:
    weight, stages, target = case
    try:
        assert_same(weight, stages, target, "cpu")
    except NonFiniteError:
        merger = TorchRowMerger(stages, weight.shape, weight.dtype, target, device="cpu")
        with pytest.raises(NonFiniteError, match="beyond the range"):
            merged(merger, weight, target)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("source", "target", "block"), ROUNDINGS)
@pytest.mark.parametrize(("variant", "axis"), FORMULAS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_larger_weights_too(
    variant: Variant, axis: Axis, source, target, block, scale: float, device: str
) -> None:
    rng = np.random.default_rng(12)
    shape = (256, 320)
    stage = stage_of(variant, axis, shape, 64, rng=rng, dtype=block, scale=scale)
    assert_same((rng.standard_normal(shape) * 0.02).astype(source), [stage], target, device)
    assert_same(values("mixed", shape, source, rng), [stage], target, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("source", "target", "block_dtype"), ROUNDINGS)
@pytest.mark.parametrize(("name", "weight", "block"), adversarial())
def test_adversarial_weights(source, target, block_dtype, name, weight, block, device) -> None:
    stage = Stage(Variant.BAT, block.astype(block_dtype))
    assert_same(weight.astype(source), [stage], target, device)


@pytest.mark.parametrize("target", [BF16, F16, F32])
def test_chunks_do_not_matter(target: np.dtype) -> None:
    rng = np.random.default_rng(13)
    stage = stage_of(Variant.BAT, Axis.OUT, (128, 64), 32, rng=rng)
    weight = values("normal", (128, 64), target, rng)
    merger = TorchRowMerger([stage], weight.shape, target, target, device="cpu")
    assert np.array_equal(
        bits(merged(merger, weight, target, 32)), bits(merged(merger, weight, target))
    )


def test_a_weight_that_is_not_finite_is_named() -> None:
    weight = np.ones((8, 6), F16)
    weight[5, 4] = np.inf
    stage = Stage(Variant.BONE, np.zeros((2, 8), np.float32))
    merger = TorchRowMerger([stage], (8, 6), F16, BF16, device="cpu")
    with pytest.raises(NonFiniteError, match="row 5, column 4 is not finite"):
        merged(merger, weight, BF16)
