from __future__ import annotations

import numpy as np
import pytest

from boneconv.dtypes import BF16, F16, F32
from boneconv.kernels import Scratch
from boneconv.kernels.narrow import FORMATS, widen
from boneconv.kernels.rounding import double_to


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_finite_number_is_widened_exactly(dtype: np.dtype) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(256, 256)
    with np.errstate(invalid="ignore"):
        every = np.where(np.isfinite(every), every, np.zeros(1, dtype))
    wide = widen(every, Scratch())
    assert wide.dtype == F32
    expected = every.astype(np.float32)
    assert np.array_equal(wide.view(np.uint32), expected.view(np.uint32))


def test_float32_is_not_copied() -> None:
    rows = np.ones((2, 2), np.float32)
    assert widen(rows, Scratch()) is rows


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_finite_number_has_its_value(dtype: np.dtype) -> None:
    infinity = int(np.array([np.inf]).astype(dtype).view(np.uint16)[0])
    magnitudes = np.arange(infinity, dtype=np.uint16)
    expected = magnitudes.view(dtype).astype(np.float64)
    form = FORMATS[dtype]
    assert np.array_equal(form.value_of(magnitudes), expected)
    assert [form.number(m) for m in range(0, infinity, 97)] == expected[::97].tolist()


def store(values: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Half up, half even, and where there was a tie."""
    form, scratch = FORMATS[dtype], Scratch()
    aligned = form.align(values, np.empty_like(values)).copy()
    low, up, even = (np.empty(values.shape, np.uint16) for _ in range(3))
    form.store_even(aligned, even, scratch)
    form.store(aligned, up, scratch, low)
    return up, even, low == 0


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_storing_rounds_to_nearest_and_finds_ties(dtype: np.dtype) -> None:
    rng = np.random.default_rng(3)
    size = 200_000
    exponents = rng.integers(-40 if dtype == F16 else -140, 14, size)
    values = (rng.standard_normal(size) * 2.0**exponents).astype(np.float32)
    values.view(np.uint32)[: size // 4] &= np.uint32(0xFFFFF000)  # ties, and near ties
    up, even, ties = store(values, dtype)
    expected = double_to(values.astype(np.float64), dtype)
    # Far below float16's last bit the aligned value is itself rounded; those count as ties.
    assert np.array_equal(up[~ties], expected[~ties])
    assert ties[: size // 4].sum() > 100
    exact = np.abs(values) >= (2.0**-13 if dtype == F16 else 0)
    assert np.array_equal(even[exact], expected[exact])
    assert (up[ties & exact] - expected[ties & exact]).max() == 1
