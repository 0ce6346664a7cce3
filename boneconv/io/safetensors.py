"""The layout of safetensors files: headers read, checked and written; tensors as byte ranges.

Only headers are parsed here. Tensor bytes are read and written by offset, a range at a time, which
the safetensors library does not offer, and its numpy reader knows no bfloat16. The rules are those
of the safetensors format: eight bytes of little-endian header length, a JSON header, then the
tensors' bytes without gaps or overlaps up to the end of the file.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boneconv.dtypes import FLOATS, SIZES, name_of
from boneconv.errors import FormatError, MachineError, listing
from boneconv.io.files import Reader
from boneconv.strict_json import parse_object

__all__ = [
    "MAX_HEADER",
    "ArrayTensor",
    "SafetensorsFile",
    "StoredTensor",
    "Tensor",
    "byte_view",
    "layout",
    "read_header",
    "tensor_nbytes",
    "write_tensors",
]

#: The safetensors library's own cap on a header.
MAX_HEADER = 100_000_000

_BROKEN = "Download or copy it again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its bytes lie and how to read them.

    Attributes:
        path: The file.
        name: The tensor's name in it.
        dtype: Its safetensors dtype, such as ``BF16``.
        shape: Its shape.
        offset: Where its bytes start, from the start of the file.
        nbytes: How many bytes it has.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> NDArray[Any]:
        """The tensor as an array of its own (float dtypes only).

        Raises:
            FormatError: It has more dimensions, or larger ones beside a zero, than arrays can have;
                or the file ends too early.
        """
        try:
            array: NDArray[Any] = np.empty(self.shape, FLOATS[self.dtype])
        except ValueError as error:
            raise FormatError(
                f"{self.name!r} has a shape that no array can have", path=self.path
            ) from error
        with Reader(self.path) as reader:
            reader.read_into(byte_view(array), self.offset)
        return array


@dataclass(frozen=True)
class ArrayTensor:
    """A tensor in memory, from a format whose files cannot be read a range at a time.

    Attributes:
        name: The tensor's name.
        array: Its values, of a dtype in `boneconv.dtypes.FLOATS`.
    """

    name: str
    array: NDArray[Any]

    @property
    def dtype(self) -> str:
        """The safetensors dtype."""
        return name_of(self.array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.array.shape

    @property
    def nbytes(self) -> int:
        """How many bytes the values have."""
        return self.array.nbytes

    def read(self) -> NDArray[Any]:
        """The values; not to be written to."""
        return self.array


#: What an adapter or a plan needs to know of a tensor: name, dtype, shape, nbytes and read().
Tensor = StoredTensor | ArrayTensor


@dataclass(frozen=True)
class SafetensorsFile:
    """A file's header, parsed.

    Attributes:
        path: The file.
        tensors: Its tensors by name, in the order of their bytes.
        metadata: The header's ``__metadata__``.
        data_start: Where the tensors' bytes start; 0 in a file of torch's, which has no header.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    data_start: int

    def read_head(self) -> bytes:
        """The bytes before the tensors': length and header, as they stand."""
        head = bytearray(self.data_start)
        with Reader(self.path) as reader:
            reader.read_into(memoryview(head), 0)
        return bytes(head)


def read_header(path: Path) -> SafetensorsFile:
    """Parses and checks a file's header; reads nothing else.

    Raises:
        FormatError: The file breaks a rule of the safetensors format.
        MissingPathError: There is no such file.
    """
    _check_regular(path)
    with Reader(path) as reader:
        size = path.stat().st_size
        if size < 8:
            raise FormatError("not a safetensors file: too short", path=path, hint=_BROKEN)
        length_bytes = bytearray(8)
        reader.read_into(memoryview(length_bytes), 0)
        length = int.from_bytes(length_bytes, "little")
        if length > MAX_HEADER or 8 + length > size:
            raise FormatError(
                "not a safetensors file, or a truncated one: its header does not fit",
                path=path,
                expected=f"a header of at most {min(MAX_HEADER, size - 8)} bytes",
                found=f"{length} bytes",
                hint=_BROKEN,
            )
        text = bytearray(length)
        reader.read_into(memoryview(text), 8)
    header = parse_object(bytes(text), path)
    metadata = _metadata(header.pop("__metadata__", {}), path)
    tensors = [_tensor(path, 8 + length, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_ranges(path, tensors, 8 + length, size)
    return SafetensorsFile(path, {t.name: t for t in tensors}, metadata, 8 + length)


def _check_regular(path: Path) -> None:
    """Raises FormatError for what is there and no file, and for a name that no file can have."""
    if "\0" in os.fspath(path):
        raise FormatError("not a name that a file can have", path=path)
    try:
        irregular = path.exists() and not path.is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise MachineError(f"{error.strerror or error}", path=path) from error
        name = f"{os.fspath(path)[:80]}..."
        raise FormatError("a name that is longer than a file's can be", path=name) from error
    if irregular:
        raise FormatError("not a regular file", path=path)


def write_tensors(
    path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays of float dtypes to a new file that is held in memory: small ones only."""
    described = [(name, name_of(array.dtype), array.shape) for name, array in arrays.items()]
    head, offsets, size = layout(described, metadata or {})
    content = bytearray(size)
    content[: len(head)] = head
    for name, array in arrays.items():
        data = byte_view(np.ascontiguousarray(array))
        content[offsets[name] : offsets[name] + len(data)] = data
    path.write_bytes(content)


def layout(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Lays out a new file.

    Args:
        tensors: Name, dtype and shape of every tensor, in the order of their bytes.
        metadata: The header's ``__metadata__``.

    Returns:
        The file's first bytes (length and header), the offset of every tensor from the start of the
        file, and the file's size.
    """
    relative, end = {}, 0
    for name, dtype, shape in tensors:
        nbytes = tensor_nbytes(dtype, shape)
        relative[name] = (end, end + nbytes)
        end += nbytes
    entries = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(relative[name])}
        for name, dtype, shape in tensors
    }
    head = _encode_header(entries, metadata)
    return head, {name: len(head) + start for name, (start, _) in relative.items()}, len(head) + end


def _encode_header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Length and header, padded with spaces to a multiple of eight bytes as the library does."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    text = json.dumps(content | dict(entries), ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def byte_view(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, to read from or write into."""
    return array.reshape(-1).view(np.uint8).data


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a safetensors dtype and a shape."""
    return math.prod(shape) * SIZES[dtype] // 8


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError("the header's __metadata__ is no map of strings", path=path)
    return value


def _tensor(path: Path, data_start: int, name: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(
            f"the header's entry of {name!r} is malformed",
            path=path,
            expected="dtype, shape, data_offsets",
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise FormatError(f"{name!r} has the unknown dtype {dtype!r}", path=path)
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{name!r} has a malformed shape or offset", path=path)
    begin, end = offsets
    bits = _elements(shape) * SIZES[dtype]
    length = f"{bits} bits" if bits % 8 else f"{bits // 8} bytes"
    if bits % 8 or end - begin != bits // 8:
        raise FormatError(
            f"the length of {name!r} contradicts its shape",
            path=path,
            expected=f"{length} for {dtype} {shape}",
            found=f"{end - begin}",
            hint=_BROKEN,
        )
    return StoredTensor(path, name, dtype, tuple(shape), data_start + begin, end - begin)


def _elements(shape: Sequence[int]) -> int:
    """The product of a shape, as far as 2**63: nobody has to multiply a million dimensions."""
    product = 1
    for size in shape:
        product *= size
        if product >= 2**63:
            break
    return product


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values
    )


def _check_ranges(path: Path, tensors: Sequence[StoredTensor], start: int, size: int) -> None:
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise FormatError(
                f"tensors overlap or leave a gap before {listing([tensor.name])}",
                path=path,
                expected=f"offset {end - start}",
                found=f"{tensor.offset - start}",
                hint=_BROKEN,
            )
        end += tensor.nbytes
    if end != size:
        raise FormatError(
            "the file is truncated" if end > size else "the file is longer than its tensors",
            path=path,
            expected=f"{end} bytes",
            found=f"{size}",
            hint=_BROKEN,
        )
