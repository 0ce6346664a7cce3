from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boneconv.dtypes import BF16, F16, F32, F64
from boneconv.kernels import exact
from boneconv.kernels.rounding import (
    BITS,
    decide,
    decide_pair,
    double_to,
    first_nonfinite,
    largest_magnitude,
)

DTYPES = [BF16, F16, F32, F64]
doubles = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(-1, 1),
    st.builds(math.ldexp, st.integers(-(2**13), 2**13), st.integers(-160, 20)),  # ties
    st.builds(  # a bit beside ties
        lambda n, e, d: math.ldexp(n, e) + math.ldexp(d, e - 38),
        st.integers(-(2**13), 2**13),
        st.integers(-160, 20),
        st.integers(-1, 1),
    ),
)


def expected_bits(value: Fraction, dtype: np.dtype) -> int | None:
    try:
        return int(np.asarray(exact.round_fraction(value, dtype)).astype(dtype).view(BITS[dtype]))
    except OverflowError:
        return None


@given(doubles, st.sampled_from(DTYPES))
@settings(max_examples=500)
def test_float64_is_rounded_once(value: float, dtype: np.dtype) -> None:
    rounded = double_to(np.array([value + 0.0]), dtype)
    expected = expected_bits(Fraction(value), dtype)
    if expected is None:
        assert np.isinf(rounded.view(dtype)).all()
    elif value:
        assert int(rounded[0]) == expected


@given(doubles, st.floats(0, 1), st.sampled_from(DTYPES), st.integers(0, 60))
@settings(max_examples=500)
def test_what_is_decided_holds_within_the_bound(
    value: float, part: float, dtype: np.dtype, digits: int
) -> None:
    bound = abs(value) * part * 2.0**-digits
    decision = decide(np.array([value]), np.array([bound]), dtype)
    if decision.undecided[0]:
        assert bound > 0
        return
    for point in (Fraction(value) - Fraction(bound), Fraction(value) + Fraction(bound)):
        expected = expected_bits(point, dtype)
        assert expected is None or int(decision.bits[0]) == expected


@given(doubles, st.floats(-1, 1), st.floats(0, 1), st.sampled_from(DTYPES), st.booleans())
@settings(max_examples=500)
def test_pairs_are_rounded_once(
    high: float, low: float, part: float, dtype: np.dtype, exactly: bool
) -> None:
    low = low * 2.0**-53 * high
    bound = 0.0 if exactly else abs(low) * part
    decision = decide_pair(np.array([high]), np.array([low]), np.array([bound]), dtype)
    if decision.undecided[0]:
        assert bound > 0 or abs(high) > 1e308
        return
    for sign in (-1, 1):
        point = Fraction(high) + Fraction(low) + sign * Fraction(bound)
        expected = expected_bits(point, dtype)
        assert expected is None or int(decision.bits[0]) == expected


def test_values_around_zero_stay_open_and_zero_itself_is_positive() -> None:
    assert decide(np.array([0.0]), np.array([1e-9]), F32).undecided[0]
    assert int(decide(np.array([-0.0]), np.array([0.0]), F32).bits[0]) == 0
    assert int(decide_pair(*np.array([[-0.0], [-0.0], [0.0]]), BF16).bits[0]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_non_finite_element(dtype: np.dtype, bad: float) -> None:
    array = np.array([[1, -2, 3], [-65000, 0.5, -0.0]]).astype(dtype)
    assert first_nonfinite(array) is None
    assert largest_magnitude(array) == float(np.abs(array).max())
    array[1, 1] = bad
    assert first_nonfinite(array) == 4
    assert not math.isfinite(largest_magnitude(array))
    assert first_nonfinite(array[:0]) is None
