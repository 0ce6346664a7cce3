from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boneconv.dtypes import BF16, F16, F32, F64
from boneconv.errors import NonFiniteError
from boneconv.kernels import Scratch, cast_rows, exact
from tests.kernels.cases import DTYPES, KINDS, bits, values


@given(
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(KINDS), st.integers(0, 2**32)
)
@settings(max_examples=200)
def test_each_element_is_rounded_once(
    source: np.dtype, target: np.dtype, kind: str, seed: int
) -> None:
    rows = values(kind, (3, 5), source, np.random.default_rng(seed))
    before = rows.copy()
    out = np.empty(rows.shape, target)
    try:
        expected = [exact.round_fraction(Fraction(float(x)), target) for x in rows.ravel()]
    except OverflowError:
        with pytest.raises(NonFiniteError, match="beyond the range"):
            cast_rows(rows, target, out, Scratch())
        return
    cast_rows(rows, target, out, Scratch())
    assert out.ravel().astype(np.float64).tolist() == expected
    assert np.array_equal(np.signbit(out.astype(F64)), np.signbit(rows.astype(F64)))
    assert np.array_equal(bits(rows), bits(before))


def test_float64_to_bfloat16_does_not_round_twice() -> None:
    rows = np.array([[1 + 2.0**-8 + 2.0**-40]])
    out = np.empty((1, 1), BF16)
    cast_rows(rows, BF16, out, Scratch())
    assert float(out[0, 0]) == 1 + 2.0**-7


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_nan_and_infinity_pass(source: np.dtype, target: np.dtype) -> None:
    rows = np.array([[np.nan, np.inf, -np.inf, -0.0, 1.0]]).astype(source)
    out = np.empty(rows.shape, target)
    cast_rows(rows, target, out, Scratch())
    assert np.isnan(out[0, 0])
    assert out[0, 1:].astype(F64).tolist() == [np.inf, -np.inf, 0.0, 1.0]
    assert np.signbit(out[0, 3])


def test_overflow_names_the_place() -> None:
    rows = np.ones((300, 400), np.float32)
    rows[250, 399] = 65520
    with pytest.raises(NonFiniteError, match=r"\(250, 399\)"):
        cast_rows(rows, F16, np.empty(rows.shape, F16), Scratch())
    rows[250, 399] = 65519
    cast_rows(rows, F16, np.empty(rows.shape, F16), Scratch())
    cast_rows(rows, F32, np.empty(rows.shape, F32), Scratch())
