"""LoRA factors: exact for Bone and mini, the best of their rank for BAT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.config import Axis, Variant
from boneconv.conversion import lora
from boneconv.conversion.lora import approximate, exact, needed_rank, spectrum
from boneconv.errors import NonFiniteError, ShapeError
from boneconv.kernels import Stage
from boneconv.kernels.reference import delta
from tests.builders import BF16, F16, F32, F64, grid


def _product(factors: lora.Factors) -> Any:
    return factors.lora_b.astype(F64) @ factors.lora_a.astype(F64)


def _bat(shape: tuple[int, int], axis: Axis, r: int = 4, scale: float = 1.0, dtype: Any = F32):
    along = shape[0] if axis is Axis.OUT else shape[1]
    return Stage(Variant.BAT, grid((along // r, r, r), dtype, 7), axis, scale)


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    rank=st.integers(1, 14),
    padding=st.integers(0, 5),
    dtype=st.sampled_from([F32, F16, BF16]),
    width=st.integers(1, 12),
)
def test_bone_and_mini_are_exact(
    rows: int, columns: int, rank: int, padding: int, dtype: Any, width: int
) -> None:
    weight = grid((rows, columns))
    stages = [Stage(Variant.BONE, grid((rank, rows), dtype, 3))]
    if rows % width == 0:
        stages.append(Stage(Variant.MINI, grid((rank, width), dtype, 3)))
    for stage in stages:
        factors = exact(stage, (rows, columns), rank + padding)
        assert factors.lora_a.shape == (rank + padding, columns)
        assert factors.lora_b.shape == (rows, rank + padding)
        assert factors.lora_a.dtype == factors.lora_b.dtype == dtype
        assert set(np.unique(factors.lora_a.astype(F64))) <= {0.0, 1.0}
        assert np.array_equal(_product(factors), delta(weight, stage))
        assert factors.error == 0.0


@given(
    rows=st.sampled_from([4, 8, 12, 20]),
    columns=st.sampled_from([4, 8, 12, 20]),
    axis=st.sampled_from(list(Axis)),
    kept=st.integers(1, 22),
    padding=st.integers(0, 3),
    scale=st.sampled_from([1.0, -0.5, 3.0]),
    band=st.sampled_from([1, 1000, 10**6]),
)
def test_bat_is_the_truncated_decomposition(
    rows: int, columns: int, axis: Axis, kept: int, padding: int, scale: float, band: int
) -> None:
    """Against numpy's own decomposition of the whole update; bands of any size agree."""
    weight, stage = grid((rows, columns)), _bat((rows, columns), axis, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "_BAND", band)
        found = spectrum(weight, stage)
        factors = approximate(weight, stage, found, kept, kept + padding)
    change = scale * delta(weight, stage)
    values = np.linalg.svd(change, compute_uv=False)
    norm = np.linalg.norm(change)
    assert found.total == pytest.approx(norm**2)
    assert found.squares == pytest.approx(values**2, abs=1e-9 * norm**2)
    best = np.linalg.norm(values[kept:]) / norm
    measured = np.linalg.norm(change - _product(factors)) / norm
    assert factors.lora_a.shape == (kept + padding, columns)
    assert factors.lora_b.shape == (rows, kept + padding)
    assert factors.error == pytest.approx(measured, abs=1e-12)
    assert factors.error == pytest.approx(best, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_the_error_counts_the_rounding_of_the_factors(dtype: Any) -> None:
    weight, stage = grid((12, 20)), _bat((12, 20), Axis.OUT, dtype=dtype)
    factors = approximate(weight, stage, spectrum(weight, stage), 12, 12)
    assert factors.lora_a.dtype == factors.lora_b.dtype == dtype
    bits = {F32: 24, F16: 11, BF16: 8}[dtype]
    assert 2.0 ** -(bits + 4) < factors.error < 2.0 ** -(bits - 3)


def test_the_energy_gives_the_smallest_rank_that_retains_it() -> None:
    weight, stage = grid((20, 12)), _bat((20, 12), Axis.IN)
    found = spectrum(weight, stage, vectors=False)
    shares = np.cumsum(found.squares) / found.squares.sum()
    for energy in (0.01, 0.5, 0.9, 0.99):
        rank = needed_rank(found, energy)
        assert shares[rank - 1] >= energy
        assert rank == 1 or shares[rank - 2] < energy
    assert needed_rank(found, 1.0) <= 12


def test_an_update_of_nothing_is_exact() -> None:
    stage = Stage(Variant.BAT, np.zeros((3, 4, 4), F32))
    weight = grid((12, 8))
    found = spectrum(weight, stage)
    factors = approximate(weight, stage, found, 2, 2)
    assert needed_rank(found, 0.9) == 1
    assert factors.error == 0.0
    assert not _product(factors).any()


def test_bad_values_and_shapes_are_refused() -> None:
    weight = grid((12, 8))
    weight[3, 3] = np.inf
    with pytest.raises(NonFiniteError), np.errstate(all="ignore"):
        spectrum(weight, _bat((12, 8), Axis.OUT))
    block = grid((4, 12))
    block[0, 0] = np.nan
    with pytest.raises(NonFiniteError):
        exact(Stage(Variant.BONE, block), (12, 8), 4)
    with pytest.raises(ShapeError):
        exact(Stage(Variant.BONE, grid((4, 13))), (12, 8), 4)
    with pytest.raises(ShapeError):
        spectrum(grid((12, 10)), _bat((12, 8), Axis.OUT))


def test_half_precision_that_cannot_hold_a_factor_is_refused() -> None:
    weight = np.full((4, 4), 60000.0, F32)
    stage = Stage(Variant.BAT, np.full((1, 4, 4), 60000.0).astype(F16))
    with pytest.raises(NonFiniteError, match="overflows float16"):
        approximate(weight, stage, spectrum(weight, stage), 4, 4)
