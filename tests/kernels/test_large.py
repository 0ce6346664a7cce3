"""A hundred million weights of each kind, every one held against an independent exact oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from boneconv.config import Variant
from boneconv.dtypes import BF16, F16
from boneconv.kernels import RowMerger, Scratch, Stage
from tests.oracle.rounding import correctly_rounded

SHAPE = (1920, 2048)
ROUNDS = 26  # x 3.9 million weights


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("variant", "rank"),
    [(Variant.BONE, 64), (Variant.BONE, 60), (Variant.BAT, 64)],
    ids=["bone", "bone-ragged", "bat"],
)
def test_a_hundred_million_weights(variant: Variant, rank: int, dtype: np.dtype[Any]) -> None:
    wrong = total = 0
    for seed in range(ROUNDS):
        rng = np.random.default_rng(seed)
        weight = (rng.standard_normal(SHAPE, dtype=np.float32) * np.float32(0.02)).astype(dtype)
        bat = (SHAPE[0] // rank, rank, rank)
        shape = bat if variant is Variant.BAT else (rank, SHAPE[0])
        block = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.01)
        found = _merge(Stage(variant, block), weight)
        expected = correctly_rounded(weight, block)
        wrong += np.count_nonzero(found.view(np.uint16) != expected.view(np.uint16))
        total += weight.size
    assert total >= 10**8
    assert wrong == 0


def _merge(stage: Stage, weight: NDArray[Any]) -> NDArray[Any]:
    merger = RowMerger([stage], SHAPE, weight.dtype, weight.dtype)
    out, scratch, step = np.empty_like(weight), Scratch(), merger.preferred_rows()
    for first in range(0, len(weight), step):
        merger.merge(weight[first : first + step], first, out[first : first + step], scratch)
    return out
