"""The exact roundings that merges are held to, held to fractions themselves."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.builders import DTYPES, same_bits
from tests.oracle.rounding import (
    FORMATS,
    approximate,
    bat_terms,
    bone_terms,
    correctly_rounded,
    round_doubles,
    round_exactly,
)


@pytest.mark.parametrize("dtype", [DTYPES["BF16"], DTYPES["F16"]])
def test_both_roundings_go_to_nearest_even(dtype: np.dtype[np.generic]) -> None:
    """Every finite number and every midpoint of two: the even neighbour, from both sides."""
    form = FORMATS[dtype]
    bits = np.arange(0x8000, dtype=np.uint16)
    finite = bits[: int(np.array(np.inf, dtype).view(np.uint16))]
    numbers = finite.view(dtype).astype(np.float64)
    midpoints = (numbers[1:] + numbers[:-1]) / 2
    even = np.where(finite[:-1] % 2 == 0, numbers[:-1], numbers[1:])
    assert np.array_equal(round_doubles(numbers, form), numbers)
    for sign in (1, -1):
        assert np.array_equal(round_doubles(sign * midpoints, form), sign * even)
        above = round_doubles(sign * np.nextafter(midpoints, np.inf), form)
        assert np.array_equal(above, sign * numbers[1:])
    for i in range(0, len(midpoints), 199):
        middle, tiny = Fraction(midpoints[i]), Fraction(2) ** -1200
        assert round_exactly(middle, form) == even[i]
        assert round_exactly(-middle - tiny, form) == -numbers[i + 1]
        assert round_exactly(middle - tiny, form) == numbers[i]
    assert math.copysign(1, round_exactly(Fraction(-1, 2**200), form)) == -1
    assert math.copysign(1, round_exactly(Fraction(0), form)) == 1


def test_the_bound_holds_and_ties_are_settled() -> None:
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(8, 12)).astype(DTYPES["BF16"])
    bone = rng.normal(size=(5, 8)).astype(np.float32)
    bat = rng.normal(size=(2, 4, 4)).astype(np.float32)
    for block, terms in ((bone, bone_terms), (bat, bat_terms)):
        values, bound = approximate(weight, block)
        for row, column in np.ndindex(*weight.shape):
            exact = sum(terms(weight, block, row, column), Fraction(0))
            assert abs(exact - Fraction(values[row, column])) <= Fraction(bound[row, column])
    ties = np.full((4, 4), 2.0**-8, np.float32)
    ones = np.ones((4, 4), DTYPES["BF16"])
    assert same_bits(correctly_rounded(ones, ties), ones)
    more = correctly_rounded(ones, np.nextafter(ties, np.float32(1)))
    assert np.array_equal(more.astype(np.float32), np.full((4, 4), 1 + 2.0**-7))
