"""An ONNX file without its weights: the protobuf message cut down before anything parses it.

A graph may hold its weights inline, up to the 2 GB that protobuf allows. `cut` walks the message's
fields and leaves out the payload of every float tensor, saying instead where in the file it lies,
in the form that ONNX has for external data. What is left is small, and ONNX's own classes parse it.

The numbers of the fields are those of ``onnx.proto`` (ONNX IR 3 to 13).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["OWN_FILE", "WireError", "cut"]

#: The location of weights that lie in the graph's own file; no external tensor may have it.
OWN_FILE = ""

_Buffer: TypeAlias = memoryview

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEEPEST = 32

#: Message -> the fields that hold a message to walk into.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}
_DIMS, _DATA_TYPE, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 13, 14
#: float_data, raw_data, double_data: little-endian values side by side.
_PAYLOADS = (4, 9, 10)
#: FLOAT, FLOAT16, DOUBLE, BFLOAT16.
_FLOATS = (1, 10, 11, 16)
_LARGE = 4096


class WireError(ValueError):
    """The bytes are no protobuf message."""


@dataclass(frozen=True)
class _Field:
    """A field: its number, its wire type, where it starts, where its value lies."""

    number: int
    kind: int
    start: int
    value: int
    end: int


def cut(data: memoryview) -> bytes:
    """A serialised ``ModelProto`` in which float tensors of the file are external to it.

    Args:
        data: The file's bytes; only those that are not weights are read.

    Returns:
        The message. A tensor whose payload was left out has the location `OWN_FILE` and the offset
        and length of the payload in the file. Scalars, and tensors that are not stored as
        consecutive values, keep theirs.

    Raises:
        WireError: The bytes are no such message.
    """
    return b"".join(_walk(data, 0, len(data), "model", 0))


def _walk(data: _Buffer, start: int, end: int, message: str, depth: int) -> list[bytes]:
    """The pieces of a message, its tensors cut down."""
    if depth > _DEEPEST:
        raise WireError("graphs are nested too deeply")
    pieces: list[bytes] = []
    inside = _INSIDE[message]
    kept = start
    for field in _fields(data, start, end):
        below = inside.get(field.number) if field.kind == _BYTES else None
        if below is None:
            continue
        if below == "tensor":
            new = _cut_tensor(data, field.value, field.end)
        else:
            new = _walk(data, field.value, field.end, below, depth + 1)
        if new:
            pieces.append(bytes(data[kept : field.start]))
            pieces.append(_key(field.number, _BYTES) + _varint_bytes(sum(map(len, new))))
            pieces += new
            kept = field.end
    if not pieces and message != "model":
        return []  # nothing to cut
    return [*pieces, bytes(data[kept:end])]


def _cut_tensor(data: _Buffer, start: int, end: int) -> list[bytes]:
    """The pieces of a ``TensorProto`` without its payload; empty where it stays as it is."""
    fields = list(_fields(data, start, end))
    for field in fields:
        if field.number == _EXTERNAL_DATA and field.kind == _BYTES:
            _check_entry(bytes(data[field.value : field.end]))
    payloads = [f for f in fields if f.number in _PAYLOADS and f.end > f.value]
    if len(payloads) != 1 or payloads[0].kind != _BYTES:
        return []
    (payload,) = payloads
    types = [_varint(data, f.value)[0] for f in fields if f.number == _DATA_TYPE]
    is_float = bool(types) and types[-1] in _FLOATS
    is_scalar = not any(f.number == _DIMS for f in fields)
    if is_scalar or not (is_float or payload.end - payload.value >= _LARGE):
        return []
    pieces = [
        bytes(data[f.start : f.end])
        for f in fields
        if f is not payload and f.number not in (_EXTERNAL_DATA, _DATA_LOCATION)
    ]
    where = {"location": OWN_FILE, "offset": payload.value, "length": payload.end - payload.value}
    pieces += [_entry(key, str(value)) for key, value in where.items()]
    return [*pieces, _key(_DATA_LOCATION, _VARINT) + b"\x01"]


def _check_entry(entry: bytes) -> None:
    """Raises WireError for a location that only `cut` may give."""
    view = memoryview(entry)
    pairs = {field.number: entry[field.value : field.end] for field in _fields(view, 0, len(entry))}
    if pairs.get(1) == b"location" and not pairs.get(2):
        raise WireError("external data without a location")


def _entry(key: str, value: str) -> bytes:
    """An ``external_data`` field of a ``TensorProto``."""
    content = b"".join(
        _key(number, _BYTES) + _varint_bytes(len(text)) + text
        for number, text in ((1, key.encode()), (2, value.encode()))
    )
    return _key(_EXTERNAL_DATA, _BYTES) + _varint_bytes(len(content)) + content


def _fields(data: _Buffer, at: int, end: int) -> Iterator[_Field]:
    while at < end:
        start = at
        key, at = _varint(data, at)
        kind = key & 7
        value = at
        if kind == _BYTES:
            length, value = _varint(data, at)
            at = value + length
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _FIXED32:
            at += 4
        elif kind == _FIXED64:
            at += 8
        else:
            raise WireError(f"a field of wire type {kind}")
        if at > end or key < 8:
            raise WireError("a field that is longer than its message")
        yield _Field(key >> 3, kind, start, value, at)


def _varint(data: _Buffer, at: int) -> tuple[int, int]:
    """A variable-length integer, and where the next byte is."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise WireError("a number that does not end")


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(number: int, kind: int) -> bytes:
    return _varint_bytes(number << 3 | kind)
