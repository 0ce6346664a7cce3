from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from boneconv.kernels.expansion import Pairs, pair_times, two_product, two_sum

numbers = st.floats(-1e100, 1e100)


def fraction(array: np.ndarray) -> Fraction:
    return Fraction(float(array[0]))


@given(numbers, numbers)
def test_a_sum_and_its_error_are_exact(a: float, b: float) -> None:
    total, error = two_sum(np.array([a]), np.array([b]))
    assert fraction(total) + fraction(error) == Fraction(a) + Fraction(b)
    assert float(total[0]) == a + b


@given(st.floats(-1e200, 1e200), st.floats(-1e90, 1e90))
@settings(max_examples=300)
def test_a_product_and_its_error_are_exact_but_for_underflow(a: float, b: float) -> None:
    product, error, missing = two_product(np.array([a]), np.array([b]))
    lost = Fraction(a) * Fraction(b) - fraction(product) - fraction(error)
    assert abs(lost) <= fraction(missing)
    if abs(a * b) > 1e-280:
        assert lost == 0


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12))
@settings(max_examples=300)
def test_pairs_account_for_every_bit(terms: list[tuple[float, float]]) -> None:
    pairs, exact = Pairs.exactly(np.zeros(1)), Fraction(0)
    for a, b in terms:
        pairs.add_product(np.array([a]), np.array([b]))
        exact += Fraction(a) * Fraction(b)
    scaled = pair_times(pairs.normalised(), np.array([0.3])).normalised()
    for found, expected in ((pairs.normalised(), exact), (scaled, exact * Fraction(0.3))):
        distance = abs(fraction(found.high) + fraction(found.low) - expected)
        assert distance <= fraction(found.bound)


def test_the_bound_is_zero_while_the_pairs_are_exact() -> None:
    pairs = Pairs.exactly(np.array([1.0]))
    pairs.add(np.array([2.0**-60]))
    pairs.add(np.array([2.0**-90]))
    assert float(pairs.bound[0]) == 0
    pairs.add(np.array([2.0**-200]))
    assert float(pairs.bound[0]) == 2.0**-200
