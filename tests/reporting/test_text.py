"""Numbers and names as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.reporting.text import columns, cosine, count, number, percent, plain, shape


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (212.0, "212"),
        (12345, "12,345"),
        (0.031234, "0.0312"),
        (1.5e-9, "1.5e-09"),
        (1234.56, "1,235"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "NaN"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, "-"),
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.5, "50.00 %"),
        (0.99999, "99.999 %"),
        (1 - 1e-9, "99.9999999 %"),
        (1e-7, "0.00001 %"),
    ],
)
def test_percent(share: float | None, text: str) -> None:
    assert percent(share) == text


@given(st.integers(1, 10**9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_only_all_is_100_percent_and_only_none_is_0(pair: tuple[int, int]) -> None:
    part, whole = pair
    text = percent(part / whole)
    assert (text == "100 %") == (part == whole)
    assert (text == "0 %") == (part == 0)
    assert 0 <= float(text.removesuffix(" %")) <= 100
    assert part in (0, whole) or 0 < float(text.removesuffix(" %")) < 100


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (1.0, "1"),
        (-1.0, "-1"),
        (0.5, "0.500000"),
        (1 - 1e-12, "0.999999"),
        (-1 + 1e-12, "-0.999999"),
    ],
)
def test_cosine(value: float | None, text: str) -> None:
    assert cosine(value) == text


def test_shape_and_count() -> None:
    assert [shape(sizes) for sizes in (None, (), (3,), (2, 3))] == ["-", "scalar", "3", "2x3"]
    assert [count(n, "tensor") for n in (0, 1, 2000)] == ["0 tensors", "1 tensor", "2,000 tensors"]


@given(st.text())
def test_plain_is_one_printable_line(text: str) -> None:
    shown = plain(text)
    assert all(c.isprintable() for c in shown)
    assert len(shown) <= 300
    shown.encode()


def test_columns_keep_their_places_whatever_the_cells() -> None:
    lines = columns([("name", "n"), ("x" * 500, "1"), ("a\nb", "22")], right=frozenset({1}))
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[-1] for line in lines] == ["n", "1", "22"]
    assert len(lines[0]) == 104
