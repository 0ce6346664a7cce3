"""Digests: a BLAKE3 tree with fixed leaves, written out here a second time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import blake3
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boneconv.digest import (
    LEAF,
    LeafHasher,
    file_digest,
    same_values,
    stored_digest,
    tensor_digest,
)
from boneconv.io.files import Reader
from boneconv.io.safetensors import ArrayTensor, read_header
from tests.builders import BF16, F16, F32, grid, leaf_digests, pack, tree_digest

MIB = 1024 * 1024


def test_a_leaf_is_a_mebibyte() -> None:
    assert LEAF == MIB


@given(cuts=st.lists(st.integers(0, 2 * MIB + 77), max_size=6), size=st.integers(0, 2 * MIB + 77))
@settings(max_examples=25)
def test_leaves_do_not_depend_on_how_the_bytes_come(cuts: list[int], size: int) -> None:
    content = memoryview(np.random.default_rng(size).bytes(size))
    hasher = LeafHasher()
    edges = sorted({0, size, *(min(cut, size) for cut in cuts)})
    for begin, end in pairwise(edges):
        hasher.update(content[begin:end])
    assert hasher.leaves() == leaf_digests(bytes(content))


@pytest.mark.parametrize(
    "shape", [(), (0,), (3,), (2, 5), (512, 1024), (MIB // 2 + 1,), (3, 0, 4)], ids=str
)
def test_a_stored_tensor_has_the_digest_of_its_bytes(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    first, tensor = grid((7,), F16), grid(shape, F32)
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({"before": first, "t": tensor, "after": first}))
    stored = read_header(path).tensors["t"]
    with Reader(path) as reader:
        found = stored_digest(stored, reader)
    assert found == tree_digest("F32", tensor)


def test_dtype_and_shape_are_part_of_a_digest() -> None:
    content = [bytes(32)]
    assert (
        len(
            {
                tensor_digest("F32", [2, 3], content),
                tensor_digest("F32", [3, 2], content),
                tensor_digest("F32", [6], content),
                tensor_digest("I32", [2, 3], content),
                tensor_digest("F32", [2, 3], [*content, *content]),
            }
        )
        == 5
    )


def test_same_values_compares_dtype_shape_and_bytes(tmp_path: Path) -> None:
    values = grid((4, 6), BF16)
    path = tmp_path / "x.safetensors"
    other = values.copy()
    other[3, 5] += BF16.type(1)
    path.write_bytes(pack({"a": values, "b": other, "wide": values.astype(F32)}))
    stored = read_header(path).tensors
    memory = ArrayTensor("a", values)
    assert same_values(stored["a"], memory)
    assert same_values(memory, stored["a"])
    assert not same_values(stored["b"], memory)
    assert not same_values(stored["wide"], memory)
    assert not same_values(ArrayTensor("a", values.T.copy()), memory)


@pytest.mark.parametrize("size", [0, 1, MIB, 2 * MIB + 5])
def test_a_file_has_the_plain_digest_of_its_bytes(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(1).bytes(size)
    path = tmp_path / "f"
    path.write_bytes(content)
    assert file_digest(path) == blake3.blake3(content).hexdigest()
