"""Corrections: any elements from any prediction, and nothing from malformed pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.delta.correction import correct, is_blank, pack, unpack
from boneconv.dtypes import BF16, F32
from boneconv.errors import FormatError
from tests.kernels.cases import DTYPES, bits


def _restored(piece: bytes, predicted: Any) -> Any:
    result = predicted.copy()
    correct(unpack(piece, predicted.size, predicted.dtype), result)
    return result


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Any, Any]:
    """Elements and a prediction, of any bit patterns: near each other or not, NaN and all."""
    dtype = draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from([(1, 1), (3, 5), (7, 1), (2, 300)]))
    width = dtype.itemsize
    elements = np.frombuffer(rng.bytes(int(np.prod(shape)) * width), f"u{width}").reshape(shape)
    steps = rng.integers(0, 2 ** draw(st.sampled_from([0, 1, 8, 15])), shape)
    near = (elements.astype(f"i{width}") + steps.astype(f"i{width}")).astype(f"u{width}")
    other = np.frombuffer(rng.bytes(elements.nbytes), f"u{width}").reshape(shape)
    return elements.view(dtype), (near if draw(st.booleans()) else other).view(dtype)


@given(pairs())
def test_any_elements_come_back_from_any_prediction(pair: tuple[Any, Any]) -> None:
    elements, predicted = pair
    piece = pack(elements, predicted)
    assert not is_blank(piece)
    assert np.array_equal(bits(_restored(piece, predicted)), bits(elements))


@given(pairs())
def test_a_blank_piece_needs_no_prediction(pair: tuple[Any, Any]) -> None:
    elements, _ = pair
    piece = pack(elements, None)
    assert is_blank(piece)
    assert np.array_equal(bits(_restored(piece, np.zeros_like(elements))), bits(elements))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_prediction_costs_one_byte(dtype: np.dtype[Any]) -> None:
    elements = np.linspace(-1, 1, 1000).astype(dtype)
    assert len(pack(elements, elements)) == 1


def test_one_unit_in_the_last_place_costs_less_than_a_byte() -> None:
    predicted = np.linspace(-1, 1, 4096, dtype=np.float32)
    elements = predicted.copy()
    elements[::50] = np.nextafter(elements[::50], np.float32(2))
    assert len(pack(elements, predicted)) < 4096 // 8


def test_minus_zero_is_one_step_below_plus_zero() -> None:
    zero = np.zeros(1, np.float32)
    assert unpack(pack(-zero, zero), 1, F32).view(np.int32).tolist() == [-1]
    assert unpack(pack(zero, -zero), 1, F32).view(np.int32).tolist() == [1]


def test_a_part_of_the_steps_corrects_a_part_of_the_elements() -> None:
    elements = np.arange(20).astype(BF16)
    steps = unpack(pack(elements, np.zeros_like(elements)), 20, BF16)
    part = np.zeros(7, BF16)
    correct(steps[5:12], part)
    assert np.array_equal(bits(part), bits(elements[5:12]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda piece: b"",
        lambda piece: piece[:-1],
        lambda piece: piece + b"\0",
        lambda piece: bytes([piece[0] ^ 128]) + piece[1:],
        lambda piece: bytes([piece[0] + 1]) + piece[1:],
        lambda piece: bytes([(piece[0] & 192) | 5]) + piece[1:],
        lambda piece: piece[:1] + b"\xff" * 20,
    ],
)
def test_a_malformed_piece_is_refused(damage: Any) -> None:
    elements = np.linspace(-1, 1, 1000).astype(BF16)
    piece = pack(elements, np.zeros_like(elements))
    with pytest.raises(FormatError, match="a correction is malformed"):
        unpack(damage(piece), 1000, BF16)


def test_a_piece_that_would_inflate_without_end_is_refused() -> None:
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(1 << 20)) + packer.flush()
    with pytest.raises(FormatError, match="a correction is malformed"):
        unpack(bytes([128 | 1]) + bomb, 100, BF16)
