"""The safetensors layout: each rule broken once, in literal bytes; agreement with the library."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from boneconv.dtypes import FLOATS, SIZES
from boneconv.errors import FormatError, MachineError, MissingPathError
from boneconv.io.safetensors import (
    MAX_HEADER,
    ArrayTensor,
    layout,
    read_header,
    tensor_nbytes,
    write_tensors,
)
from tests.builders import BF16, F16, F32, F64, Raw, entry, grid, pack, raw_file, same_bits

TWO = {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 4, 8)}


def _file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


# --- what is read -----------------------------------------------------------------------------


def test_golden_bytes_of_one_tensor(tmp_path: Path) -> None:
    content = (
        b'\x40\0\0\0\0\0\0\0{"t":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]}}    \n  '
        b"\x80\x3f\x00\xc0"
    )
    found = read_header(_file(tmp_path, content))
    (tensor,) = found.tensors.values()
    assert (tensor.name, tensor.dtype, tensor.shape) == ("t", "BF16", (2, 1))
    assert (tensor.offset, tensor.nbytes, found.data_start) == (72, 4, 72)
    assert tensor.read().astype(F32).tolist() == [[1.0], [-2.0]]
    assert found.metadata == {}


def test_golden_bytes_of_a_written_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"é": np.array([1.0], F16)}, {"format": "pt"})
    header = '{"__metadata__":{"format":"pt"},"é":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}'
    text = header.encode() + b" " * (-len(header.encode()) % 8)
    assert path.read_bytes() == len(text).to_bytes(8, "little") + text + b"\x00\x3c"


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {
        "last": entry("U8", [2], 5, 7),
        "empty": entry("F32", [0, 3], 1, 1),
        "first": entry("BOOL", [1], 0, 1),
        "scalar": entry("F32", [], 1, 5),
    }
    found = read_header(_file(tmp_path, raw_file(header, bytes(7))))
    assert list(found.tensors) == ["first", "empty", "scalar", "last"]


def test_metadata_is_kept(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt", "": "é\n"}} | TWO
    assert read_header(_file(tmp_path, raw_file(header, bytes(8)))).metadata == {
        "format": "pt",
        "": "é\n",
    }


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert read_header(_file(tmp_path, raw_file({}))).tensors == {}


@pytest.mark.parametrize("dtype", sorted(SIZES))
def test_every_dtype_of_the_format_has_its_length(tmp_path: Path, dtype: str) -> None:
    nbytes = 8 * SIZES[dtype] // 8
    path = _file(tmp_path, raw_file({"t": entry(dtype, [2, 4], 0, nbytes)}, bytes(nbytes)))
    assert read_header(path).tensors["t"].nbytes == nbytes == tensor_nbytes(dtype, (2, 4))


def test_nothing_but_the_header_is_read(tmp_path: Path) -> None:
    """A terabyte of tensor, which the file system does not have to store."""
    size = 2**40
    content = raw_file({"t": entry("U8", [size], 0, size)})
    path = _file(tmp_path, content)
    try:
        os.truncate(path, len(content) + size)
    except OSError:
        size = 2**33
        content = raw_file({"t": entry("U8", [size], 0, size)})
        path.write_bytes(content)
        os.truncate(path, len(content) + size)
    assert read_header(path).tensors["t"].nbytes == size


# --- each rule, broken ------------------------------------------------------------------------

HUGE = 2**62

BROKEN: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "too short"),
    "seven bytes": (bytes(7), "too short"),
    "no header": (bytes(8), "not a JSON file"),
    "a header longer than the file": (raw_file(TWO, length=10_000), "its header does not fit"),
    "a header one byte too long": (raw_file({}, length=3), "its header does not fit"),
    "a header beyond the cap": (
        (MAX_HEADER + 1).to_bytes(8, "little") + bytes(100),
        "its header does not fit",
    ),
    "a length with the highest bit": (b"\xff" * 8 + b"{}", "its header does not fit"),
    "a pickle": (b"\x80\x02}q\x00(X\x01\x00\x00\x00", "its header does not fit"),
    "a header that is no JSON": (raw_file(b"{]"), "not a JSON file"),
    "a header that is a list": (raw_file([]), "not a JSON object"),
    "a header that is not UTF-8": (raw_file(b'{"\xff": 1}'), "not UTF-8"),
    "a header of nested braces": (raw_file(b'{"a":' * 50_000), "nested too deeply"),
    "a repeated name": (
        raw_file(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'),
        "the key 'a' stands twice",
    ),
    "metadata that is no map": (raw_file({"__metadata__": []}), "no map of strings"),
    "metadata of numbers": (raw_file({"__metadata__": {"a": 1}}), "no map of strings"),
    "an entry that is no map": (raw_file({"a": 3}), "entry of 'a' is malformed"),
    "an entry without dtype": (
        raw_file({"a": {"shape": [], "data_offsets": [0, 0]}}),
        "entry of 'a' is malformed",
    ),
    "an entry with another field": (
        raw_file({"a": entry("U8", [0], 0, 0) | {"crc": 1}}),
        "entry of 'a' is malformed",
    ),
    "an unknown dtype": (raw_file({"a": entry("F128", [0], 0, 0)}), "unknown dtype 'F128'"),
    "a dtype in lower case": (raw_file({"a": entry("f32", [0], 0, 0)}), "unknown dtype 'f32'"),
    "a dtype that is a list": (
        raw_file({"a": entry("U8", [0], 0, 0) | {"dtype": ["U8"]}}),
        "unknown dtype",
    ),
    "a shape that is a number": (
        raw_file({"a": entry("U8", [0], 0, 0) | {"shape": 0}}),
        "malformed shape or offset",
    ),
    "a negative dimension": (raw_file({"a": entry("U8", [-1], 0, 0)}), "malformed shape"),
    "a dimension of 1.0": (raw_file({"a": entry("U8", [1.0], 0, 1)}, b"1"), "malformed shape"),  # type: ignore[list-item]
    "a dimension that is true": (raw_file({"a": entry("U8", [True], 0, 1)}, b"1"), "malformed"),
    "a dimension beyond 63 bits": (raw_file({"a": entry("U8", [2**63], 0, 0)}), "malformed"),
    "a negative offset": (raw_file({"a": entry("U8", [1], -1, 0)}), "malformed"),
    "one offset": (
        raw_file({"a": entry("U8", [0], 0, 0) | {"data_offsets": [0]}}),
        "malformed shape or offset",
    ),
    "an end before its begin": (raw_file({"a": entry("U8", [1], 1, 0)}), "contradicts its shape"),
    "too few bytes for the shape": (
        raw_file({"a": entry("F32", [2], 0, 7)}, bytes(7)),
        "contradicts its shape; expected 8 bytes for F32 [2], found 7",
    ),
    "too many bytes for the shape": (
        raw_file({"a": entry("F32", [2], 0, 9)}, bytes(9)),
        "contradicts its shape; expected 8 bytes",
    ),
    "half a byte": (
        raw_file({"a": entry("F4", [3], 0, 1)}, bytes(1)),
        "contradicts its shape; expected 12 bits",
    ),
    "a shape whose product overflows 64 bits to the right length": (
        raw_file({"a": entry("U8", [2**32, 2**32, 5], 0, 0)}),
        "contradicts its shape",
    ),
    "a shape whose product no float holds": (
        raw_file({"a": entry("U8", [HUGE] * 20, 0, 8)}, bytes(8)),
        "contradicts its shape",
    ),
    "a shape of a million dimensions": (
        raw_file({"a": entry("U8", [HUGE] * 1_000_000, 0, 8)}, bytes(8)),
        "contradicts its shape",
    ),
    "an overlap": (
        raw_file(TWO | {"b": entry("F32", [1], 2, 6)}, bytes(6)),
        "tensors overlap or leave a gap before b; expected offset 4, found 2",
    ),
    "two tensors of the same bytes": (
        raw_file(TWO | {"b": entry("F32", [1], 0, 4)}, bytes(4)),
        "overlap or leave a gap before b",
    ),
    "a gap": (
        raw_file(TWO | {"b": entry("F32", [1], 5, 9)}, bytes(9)),
        "overlap or leave a gap before b; expected offset 4, found 5",
    ),
    "a hole before the first": (
        raw_file({"a": entry("F32", [1], 1, 5)}, bytes(5)),
        "gap before a; expected offset 0, found 1",
    ),
    "a truncated file": (raw_file(TWO, bytes(7)), "the file is truncated"),
    "an extra byte": (raw_file(TWO, bytes(9)), "the file is longer than its tensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_an_error_of_its_own(tmp_path: Path, case: str) -> None:
    content, says = BROKEN[case]
    path = _file(tmp_path, content)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    text = str(caught.value)
    assert says in text
    assert text.startswith(f"{path}: ")
    assert len(text) < 2000


def test_the_library_refuses_the_same_files(tmp_path: Path) -> None:
    """What it takes and we refuse: a repeated name, an unknown field, and a shape beyond 2**63."""
    taken = set()
    for case, (content, _) in BROKEN.items():
        try:
            safetensors.deserialize(content)
            taken.add(case)
        except Exception:  # noqa: BLE001
            continue
    assert taken <= {"a repeated name", "an entry with another field", "metadata that is no map"}


def test_a_name_of_a_megabyte_gives_a_short_message(tmp_path: Path) -> None:
    header = {"n" * 1_000_000: entry("F32", [1], 0, 3)}
    with pytest.raises(FormatError) as caught:
        read_header(_file(tmp_path, raw_file(header, bytes(3))))
    assert len(str(caught.value)) < 4000


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError):
        read_header(tmp_path / "none.safetensors")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """Opening a pipe for reading would wait for a writer for ever."""
    pipe = tmp_path / "model.safetensors"
    os.mkfifo(pipe)
    with pytest.raises(FormatError, match="not a regular file"):
        read_header(pipe)
    with pytest.raises(FormatError, match="not a regular file"):
        read_header(tmp_path)


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path, raw_file(TWO, bytes(8)))

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MachineError, match="Permission denied"):
        read_header(path)


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_no_bytes_give_anything_but_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = _file(tmp_path_factory.mktemp("any"), content)
    with pytest.raises(FormatError):
        read_header(path)


@given(data=st.data())
@settings(max_examples=100)
def test_a_damaged_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(pack({"a": grid((2, 3)), "b": grid((4,), BF16)}, {"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = _file(tmp_path_factory.mktemp("any"), bytes(content))
    try:
        found = read_header(path)
    except FormatError:
        return
    assert sum(tensor.nbytes for tensor in found.tensors.values()) == 32


# --- round trips ------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TENSORS = st.dictionaries(
    NAMES, st.tuples(SHAPES, st.sampled_from([F64, F32, F16, BF16])), max_size=6
)
METADATA = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)


def _arrays(described: dict[str, Any]) -> dict[str, Any]:
    return {name: grid(shape, dtype) for name, (shape, dtype) in described.items()}


@given(described=TENSORS, metadata=METADATA)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, Any], metadata: dict[str, str]
) -> None:
    arrays, path = _arrays(described), tmp_path_factory.mktemp("w") / "x.safetensors"
    write_tensors(path, arrays, metadata)
    found = read_header(path)
    assert list(found.tensors) == sorted(
        arrays, key=lambda n: (found.tensors[n].offset, arrays[n].nbytes)
    )
    assert found.metadata == metadata
    assert all(same_bits(found.tensors[name].read(), arrays[name]) for name in arrays)
    assert found.data_start % 8 == 0


@given(described=TENSORS, metadata=METADATA)
def test_the_library_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, Any], metadata: dict[str, str]
) -> None:
    arrays, path = _arrays(described), tmp_path_factory.mktemp("w") / "x.safetensors"
    write_tensors(path, arrays, metadata)
    with safetensors.safe_open(path, "np") as file:
        assert (file.metadata() or {}) == metadata
    found = dict(safetensors.deserialize(path.read_bytes()))
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert (
            found[name]["dtype"] == {F64: "F64", F32: "F32", F16: "F16", BF16: "BF16"}[array.dtype]
        )
        assert tuple(found[name]["shape"]) == array.shape
        assert bytes(found[name]["data"]) == array.tobytes()


def _specs(arrays: dict[str, Any]) -> dict[str, Any]:
    names = {F64: "float64", F32: "float32", F16: "float16", BF16: "bfloat16"}
    return {
        name: safetensors.TensorSpec(
            dtype=names[a.dtype], shape=list(a.shape), data_ptr=a.ctypes.data, data_len=a.nbytes
        )
        for name, a in arrays.items()
    }


@given(described=TENSORS, metadata=METADATA)
def test_we_read_what_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, Any], metadata: dict[str, str]
) -> None:
    arrays, path = _arrays(described), tmp_path_factory.mktemp("w") / "x.safetensors"
    path.write_bytes(safetensors.serialize(_specs(arrays), metadata or None))
    found = read_header(path)
    assert set(found.tensors) == set(arrays)
    assert found.metadata == metadata
    assert all(same_bits(found.tensors[name].read(), arrays[name]) for name in arrays)


@given(described=TENSORS, metadata=METADATA)
def test_a_layout_is_what_the_file_has(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, Any], metadata: dict[str, str]
) -> None:
    arrays = _arrays(described)
    rows = [(name, _name(a.dtype), a.shape) for name, a in arrays.items()]
    head, offsets, size = layout(rows, metadata)
    path = _file(tmp_path_factory.mktemp("w"), head.ljust(size, b"\0"))
    found = read_header(path)
    assert {name: tensor.offset for name, tensor in found.tensors.items()} == offsets
    assert found.data_start == len(head)


def _name(dtype: Any) -> str:
    return next(name for name, known in FLOATS.items() if known == dtype)


def test_integers_are_laid_out_as_well(tmp_path: Path) -> None:
    head, offsets, size = layout([("a", "I64", (3,)), ("b", "F4", (2, 3))], {})
    assert size - len(head) == 24 + 3
    assert offsets == {"a": len(head), "b": len(head) + 24}
    assert json.loads(head[8:])["b"]["data_offsets"] == [24, 27]


def test_a_tensor_in_memory_describes_itself() -> None:
    tensor = ArrayTensor("t", grid((2, 3), BF16))
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == ("BF16", (2, 3), 12)
    assert tensor.read() is tensor.array


def test_tensors_that_are_not_contiguous_are_written_in_order(tmp_path: Path) -> None:
    array = grid((4, 6)).T
    write_tensors(tmp_path / "x", {"t": array})
    assert same_bits(read_header(tmp_path / "x").tensors["t"].read(), np.ascontiguousarray(array))


def test_a_tensor_of_an_unknown_dtype_is_a_range_of_bytes(tmp_path: Path) -> None:
    path = _file(tmp_path, pack({"q": Raw("F8_E4M3", (3,), b"abc"), "w": grid((2,))}))
    tensor = read_header(path).tensors["q"]
    assert path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes] == b"abc"
