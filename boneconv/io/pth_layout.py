"""The layout of torch's ``.pth`` files: written by offset, without torch.

Such a file is an uncompressed zip archive of a pickle, which describes the tensors, and one entry
of raw bytes for each of them. Everything but the checksums is known from names, dtypes and shapes
alone, so tensors can be written in any order and the archive sealed at the end. The pickle is put
together from opcodes here; reading one is left to torch (`boneconv.io.pickles`).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from boneconv.errors import FormatError
from boneconv.io.files import Reader, Writer
from boneconv.io.safetensors import tensor_nbytes

__all__ = ["PthLayout", "layout_pth"]

#: What `torch.save` calls the storage of a tensor of a safetensors dtype.
_STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}

_ROOT = "archive"
_ALIGNMENT = 64  # torch maps the bytes in place
_CHUNK = 8 * 1024 * 1024
_UNKNOWN = 0xFFFFFFFF  # the true value stands in the zip64 field
_ZIP64, _PADDING = 0x0001, 0x4246  # ids of extra fields; the second is torch's own
_VERSION = 45  # the zip64 version of the zip format
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")


@dataclass(frozen=True)
class _Entry:
    """An entry of the archive: where its header and its bytes lie; small ones with content."""

    name: bytes
    start: int
    data: int
    size: int
    content: bytes | None = None

    def header(self, crc: int) -> bytes:
        """What stands before its bytes, padded so that they are aligned."""
        sizes = struct.pack("<2H2Q", _ZIP64, 16, self.size, self.size)
        room = self.data - self.start - _LOCAL.size - len(self.name) - len(sizes)
        padding = struct.pack("<2H", _PADDING, room - 4) + bytes(room - 4)
        fields = (_VERSION, 0, 0, 0, 0x21, crc, _UNKNOWN, _UNKNOWN)
        lengths = len(self.name), len(sizes) + len(padding)
        return _LOCAL.pack(b"PK\3\4", *fields, *lengths) + self.name + sizes + padding

    def listing(self, crc: int) -> bytes:
        """Its line in the archive's directory."""
        extra = struct.pack("<2H3Q", _ZIP64, 24, self.size, self.size, self.start)
        fields = (_VERSION, _VERSION, 0, 0, 0, 0x21, crc, _UNKNOWN, _UNKNOWN)
        lengths = len(self.name), len(extra), 0, 0, 0, 0
        return _CENTRAL.pack(b"PK\1\2", *fields, *lengths, _UNKNOWN) + self.name + extra


@dataclass(frozen=True)
class PthLayout:
    """A ``.pth`` file to be.

    Attributes:
        head: Its first bytes, up to the first tensor.
        offsets: Where each tensor's bytes start, from the start of the file.
        size: Its size in bytes.
    """

    head: bytes
    offsets: dict[str, int]
    size: int
    _entries: tuple[_Entry, ...]
    _directory: int

    def seal(self, path: Path) -> None:
        """Writes all that is not a tensor's bytes; those are in their places, and are read once.

        Raises:
            MachineError: The file cannot be read or written.
        """
        listings = b""
        with Reader(path) as reader, Writer(path) as writer:
            for entry in self._entries:
                if entry.content is not None:
                    writer.write_at(entry.content, entry.data)
                crc = _crc(reader, entry)
                writer.write_at(entry.header(crc), entry.start)
                listings += entry.listing(crc)
            end = _end(self._directory, len(listings), len(self._entries))
            writer.write_at(listings + end, self._directory)


def layout_pth(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> PthLayout:
    """Lays out a new file.

    Args:
        tensors: Name, safetensors dtype and shape of every tensor, in the order of their bytes.

    Raises:
        FormatError: A dtype that these files have no plain storage for.
    """
    small = [("data.pkl", _pickle(tensors)), ("byteorder", b"little"), ("version", b"3\n")]
    entries: list[_Entry] = []
    for name, content in small:
        entries.append(_next(entries, name, len(content), content))
    for number, (_, dtype, shape) in enumerate(tensors):
        entries.append(_next(entries, f"data/{number}", tensor_nbytes(dtype, shape)))
    directory = entries[-1].data + entries[-1].size
    listings = b"".join(entry.listing(0) for entry in entries)
    size = directory + len(listings) + len(_end(directory, len(listings), len(entries)))
    own = entries[len(small) :]
    offsets = {name: entry.data for (name, _, _), entry in zip(tensors, own, strict=True)}
    head = b"".join(e.header(zlib.crc32(c)) + c for e, (_, c) in zip(entries, small, strict=False))
    return PthLayout(head, offsets, size, tuple(entries), directory)


def _next(entries: Sequence[_Entry], name: str, size: int, content: bytes | None = None) -> _Entry:
    start = entries[-1].data + entries[-1].size if entries else 0
    path = f"{_ROOT}/{name}".encode()
    least = start + _LOCAL.size + len(path) + 20 + 4
    return _Entry(path, start, math.ceil(least / _ALIGNMENT) * _ALIGNMENT, size, content)


def _crc(reader: Reader, entry: _Entry) -> int:
    crc = 0
    buffer = memoryview(bytearray(min(_CHUNK, entry.size)))
    for start in range(0, entry.size, _CHUNK):
        part = buffer[: min(_CHUNK, entry.size - start)]
        reader.read_into(part, entry.data + start)
        crc = zlib.crc32(part, crc)
    return crc


def _end(directory: int, nbytes: int, count: int) -> bytes:
    """The records that end an archive of any size."""
    wide = struct.pack(
        "<4sQ2H2I4Q", b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, count, count, nbytes, directory
    )
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, directory + nbytes, 1)
    plain = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _UNKNOWN, _UNKNOWN, 0)
    return wide + locator + plain


def _pickle(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """A pickle (protocol 2) of a dict from names to tensors, each with a storage of its own."""
    items = [_text(name) + _tensor(i, dtype, s) for i, (name, dtype, s) in enumerate(tensors)]
    return b"\x80\x02}(" + b"".join(items) + b"u."


def _tensor(number: int, dtype: str, shape: tuple[int, ...]) -> bytes:
    if dtype not in _STORAGES:
        raise FormatError(
            "a dtype that a .pth file does not hold here",
            expected=", ".join(_STORAGES),
            found=dtype,
            hint="Write a .safetensors file instead",
        )
    storage = b"(%s%s%s%s%st" % (
        _text("storage"),
        _global("torch", _STORAGES[dtype]),
        _text(str(number)),
        _text("cpu"),
        _int(math.prod(shape)),
    )
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    no_hooks = _global("collections", "OrderedDict") + b")R"
    arguments = (storage + b"Q", _int(0), _tuple(shape), _tuple(strides), b"\x89", no_hooks)
    return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + b"".join(arguments) + b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"
