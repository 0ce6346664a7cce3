"""Files of tensors written one at a time: in any order, read back, with what differs named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.errors import MachineError
from boneconv.formats.writing import TensorFile, describe
from boneconv.io.pickles import read_torch_file
from boneconv.io.safetensors import ArrayTensor, read_header
from tests.builders import BF16, F16, F32, F64, Array, grid, same_bits, unpack


def _write(path: Path, arrays: dict[str, Array], *, pth: bool) -> TensorFile:
    tensors = {name: ArrayTensor(name, array) for name, array in arrays.items()}
    with TensorFile(path, describe(tensors), pth=pth) as file:
        for name, tensor in reversed(tensors.items()):
            file.copy(name, tensor)
    return file


@given(
    dtypes=st.lists(st.sampled_from([F64, F32, F16, BF16]), min_size=1, max_size=5),
    shape=st.lists(st.integers(0, 4), max_size=3),
    pth=st.booleans(),
)
def test_what_is_written_reads_back(
    tmp_path_factory: pytest.TempPathFactory, dtypes: list[Any], shape: list[int], pth: bool
) -> None:
    folder = tmp_path_factory.mktemp("written")
    arrays = {f"t{i}": grid(tuple(shape), dtype, i) for i, dtype in enumerate(dtypes)}
    _write(folder / "a", arrays, pth=pth).check()
    if pth:
        found = {name: tensor.array for name, tensor in read_torch_file(folder / "a").items()}
    else:
        found = unpack(folder / "a")
    assert list(found) == list(arrays)
    assert all(same_bits(found[name], array) for name, array in arrays.items())


def test_a_transposed_array_is_written_in_order(tmp_path: Path) -> None:
    array = grid((3, 5)).T
    with TensorFile(tmp_path / "a", [("t", "F32", (5, 3))]) as file:
        file.put("t", array)
    file.check()
    assert np.array_equal(unpack(tmp_path / "a")["t"], array)


def test_tensors_are_copied_from_file_to_file(tmp_path: Path) -> None:
    _write(tmp_path / "a.safetensors", {"t": grid((3, 5), BF16)}, pth=False)
    stored = read_header(tmp_path / "a.safetensors").tensors["t"]
    with TensorFile(tmp_path / "b", [("renamed", "BF16", (3, 5))]) as file:
        file.copy("renamed", stored)
    assert same_bits(unpack(tmp_path / "b")["renamed"], grid((3, 5), BF16))


@pytest.mark.parametrize("pth", [False, True])
def test_one_changed_bit_is_found(tmp_path: Path, pth: bool) -> None:
    file = _write(tmp_path / "a", {"one": grid((3, 5)), "two": grid((4,), seed=3)}, pth=pth)
    content = bytearray((tmp_path / "a").read_bytes())
    content[content.index(grid((4,), seed=3).tobytes()) + 5] ^= 1
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(MachineError, match=r"reads back differently: two"):
        file.check()
