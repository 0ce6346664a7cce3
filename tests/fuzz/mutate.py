"""Mutations of a case: files by name, changed as their formats invite it.

Three kinds: bytes (flips, splices, truncations, lengths), JSON (what parsers disagree about:
numbers without end, NaN, keys that stand twice, nesting, wrong types, halves of surrogate pairs,
names that lead elsewhere or move a cursor), and structure (headers of safetensors files, the
members of a torch file's archive, the messages of an ONNX graph). The same seed gives the same
cases.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

__all__ = ["LARGEST", "Case", "Mutator"]

Case = dict[str, bytes]

#: No file of a case grows beyond this, so that time and memory can be held against it.
LARGEST = 1 << 16

#: What the library raises for archives that an earlier change damaged.
_DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError)

_RAW, _TWICE = "@raw:", "@twice:"

#: JSON texts that stand in the place of a value; most are no value at all.
RAW_VALUES = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e-999",
    "1.0",
    "-0",
    "-0.0",
    "01",
    "+1",
    "9" * 400,
    "9" * 5000,
    "-" + "9" * 310,
    "18446744073709551616",
    "9223372036854775808",
    "4611686018427387904",
    "9007199254740993",
    "[" * 3000,
    "[" * 150 + "]" * 150,
    "[" * 900 + "]" * 900,
    '{"a":' * 800 + "1" + "}" * 800,
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\u0000"',
    '"\\u001b[2J\\u001b[31mforged"',
    '"one\\nError: forged"',
    '"\x1b[2J"',
    '"\n"',
    "'",
    '"',
    "{}",
    "[]",
    "null",
    "true",
    "false",
    "0",
    "-1",
    "[[]]",
    "[null]",
    "[-1]",
    "[true]",
    "[1.5]",
    "",
)
TEXTS = (
    "",
    ".",
    "..",
    "../secret.safetensors",
    "../secret",
    "/etc/hostname",
    "a/../../secret.safetensors",
    "..\\secret.safetensors",
    "C:\\secret",
    "C:secret",
    "//host/share",
    "a\0b",
    "line\nbreak",
    "\x1b[2J\x1b]0;title\x07",
    "\r\rforged",
    "\u202etxt.exe",
    "\u2028",
    "\x85",
    "\x9b31m",
    "\ufeff",
    "é",
    "e\u0301",
    "\U0001f600" * 40,
    "x" * 300,
    "x" * 300 + ".safetensors",
    "\0.safetensors",
    "\x1b[2J.safetensors",
    "../secret.safetensors\n",
    "a." * 400,
    "(a+)+$",
    "(" * 200,
    "[",
    "__metadata__",
    "__proto__",
    "BONE",
    "MISS",
    "LORA",
    "BONE_ADAPTER",
    "bat",
    "mini",
    "I4",
    "F4",
    "F8_E4M3",
    "BF16",
    "C64",
    "BOOL",
    "1" * 5000,
    "٣",
    "model.layers." + "1" * 5000 + ".q_proj",
)
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30)
LENGTHS = (0, 1, 7, 8, 100_000_000, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
SHAPES: tuple[Any, ...] = (
    [],
    [0],
    [0, 2**62, 2**62],
    [2**62, 2**62, 0],
    [2**62, 0],
    [2**32, 2**32],
    [2**31, 2**31, 4],
    [1] * 70,
    [0] * 70,
    [1] * 3000,
    [2**62] * 500,
    [-1, -4],
    [1, 1],
)


class Mutator:
    """Changes cases; the same seed and calls give the same results."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed)

    def mutate(self, case: Case, others: list[Case]) -> Case:
        """A changed copy of a case, of whose kind there are others."""
        changed = dict(case)
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            name = self.random.choice(sorted(changed))
            other = self.random.choice(others).get(name, b"")
            changed[name] = self._file(name, changed[name], other)[:LARGEST]
        return changed

    def _file(self, name: str, content: bytes, other: bytes) -> bytes:
        structured = self.random.random() < 0.75
        try:
            if structured and name.endswith(".json"):
                return self.json_text(json.loads(content))
            if structured and name.endswith((".safetensors", "delta")):
                return self._safetensors(content)
            if structured and name.endswith(".pth"):
                return self._archive(content)
            if structured and name.endswith(".onnx"):
                return self._graph(content)
        except (ValueError, ArithmeticError, LookupError, TypeError, RecursionError, *_DAMAGED):
            pass  # an earlier change left it beyond structure
        return self.bytes(content, other)

    # --- bytes --------------------------------------------------------------------------------

    def bytes(self, content: bytes, other: bytes = b"") -> bytes:
        """A change that knows nothing of the format."""
        pick, size = self.random, len(content)
        data = bytearray(content)
        at = pick.randrange(size + 1)
        end = min(size, at + pick.randrange(1, 17))
        kind = pick.randrange(9)
        if kind == 0 and at < size:
            data[at] ^= 1 << pick.randrange(8)
        elif kind == 1 and at < size:
            data[at] = pick.choice(b'\0\x01\x7f\x80\xff"\\{}[]:,0\x1b\n')
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end] * pick.choice((1, 2, 64))
        elif kind == 4:
            data[at:at] = pick.randbytes(pick.randrange(1, 9))
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            data[at:end] = pick.choice(LENGTHS).to_bytes(8, "little")[: end - at]
        elif kind == 7 and other:
            data[at:] = other[pick.randrange(len(other)) :]
        else:
            data[:8] = pick.choice(LENGTHS).to_bytes(8, "little")
        return bytes(data)

    # --- JSON ---------------------------------------------------------------------------------

    def json_text(self, value: Any) -> bytes:
        """The text of a JSON value in which one or a few places were changed."""
        for _ in range(self.random.choice((1, 1, 2))):
            value = self._edit(value)
        return encode(value)

    def _edit(self, value: Any) -> Any:
        """Walks to some place of a value and changes it."""
        pick = self.random
        if isinstance(value, dict) and value and pick.random() < 0.9:
            key = pick.choice(list(value))
            if pick.random() < 0.3:
                return self._edit_key(value, key)
            return value | {key: self._edit(value[key])}
        if isinstance(value, list) and value and pick.random() < 0.8:
            at = pick.randrange(len(value))
            return [*value[:at], self._edit(value[at]), *value[at + 1 :]]
        if isinstance(value, str) and value[:1] == "{" and pick.random() < 0.9:
            try:  # JSON in a text, as the metadata of a native adapter
                return encode(self._edit(json.loads(value)), sort=True).decode()
            except (ValueError, RecursionError):
                pass
        return self._replacement(value)

    def _edit_key(self, value: Mapping[str, Any], key: str) -> dict[str, Any]:
        pick = self.random
        kind = pick.randrange(5)
        changed = dict(value)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[_TWICE + key] = pick.choice((changed[key], None, {}))
        elif kind == 2:
            changed[pick.choice(TEXTS)] = changed.pop(key)
        elif kind == 3:
            changed[pick.choice(TEXTS)] = changed[key]
        else:
            changed[key + pick.choice((".weight", ".x", "\n", "\x1b[2J"))] = changed.pop(key)
        return changed

    def _replacement(self, value: Any) -> Any:
        pick = self.random
        kind = pick.randrange(6)
        if kind == 0:
            return _RAW + pick.choice(RAW_VALUES)
        if kind == 1:
            return pick.choice(TEXTS)
        if kind == 2:
            return pick.choice(NUMBERS)
        if kind == 3 and isinstance(value, list):
            return pick.choice(SHAPES)
        if kind == 3 and isinstance(value, int):
            return value + pick.choice((-1, 1, 2, 8, -value * 2))
        if kind == 4:
            return pick.choice(([], {}, [value], {"a": value}, [value] * 50, None))
        return pick.choice((True, False, None, 1.5, "0", -1))

    # --- safetensors --------------------------------------------------------------------------

    def _safetensors(self, content: bytes) -> bytes:
        pick = self.random
        length = int.from_bytes(content[:8], "little")
        text, data = content[8 : 8 + length], content[8 + length :]
        kind = pick.randrange(8)
        if kind == 0:
            return pick.choice(LENGTHS).to_bytes(8, "little") + text + data
        if kind == 1:
            return (length + pick.choice((-8, -1, 1, 8))).to_bytes(8, "little") + text + data
        if kind == 2:
            return content[: 8 + length] + self.bytes(data)
        header = json.loads(text)
        text = encode(self._offsets(header)) if kind == 3 else self.json_text(header)
        return len(text).to_bytes(8, "little") + text + data

    def _offsets(self, header: dict[str, Any]) -> dict[str, Any]:
        """Tensors that overlap, leave gaps, or change places and shapes."""
        pick = self.random
        names = [name for name in header if name != "__metadata__"]
        one, other = pick.choice(names), pick.choice(names)
        changed = json.loads(json.dumps(header))
        kind = pick.randrange(4)
        if kind == 0:
            changed[one], changed[other] = changed[other], changed[one]
        elif kind == 1:
            changed[one]["data_offsets"][pick.randrange(2)] += pick.choice((-4, -1, 1, 2, 2**62))
        elif kind == 2:
            changed[one]["shape"] = pick.choice(SHAPES)
            changed[one]["data_offsets"] = [0, 0]
        else:
            changed[one]["data_offsets"] = changed[other]["data_offsets"]
        return changed

    # --- torch's archives ---------------------------------------------------------------------

    def _archive(self, content: bytes) -> bytes:
        """The archive with a member changed, packed, taken out or added."""
        pick = self.random
        if not zipfile.is_zipfile(io.BytesIO(content)):
            return self.bytes(content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(entry, archive.read(entry)) for entry in archive.infolist()]
        at = pick.randrange(len(members))
        kind = pick.randrange(6)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for number, (entry, data) in enumerate(members):
                name, how = entry.filename, zipfile.ZIP_STORED
                if number == at or (kind == 0 and name.endswith("data.pkl")):
                    if kind == 2:
                        continue
                    if kind == 3:
                        how = zipfile.ZIP_DEFLATED
                    elif kind == 4:
                        name = name.rpartition("/")[0] + "/" + pick.choice(("..", "data/9", "x"))
                    elif kind == 5:
                        data = zlib.compress(bytes(LARGEST))[: len(data) or 1]
                    else:
                        data = self.bytes(data)
                archive.writestr(name, data, compress_type=how)
        return out.getvalue()

    # --- ONNX ---------------------------------------------------------------------------------

    def _graph(self, content: bytes) -> bytes:
        from google.protobuf.message import DecodeError
        from onnx import ModelProto

        model = ModelProto()
        try:
            model.ParseFromString(content)
        except DecodeError:
            return self.bytes(content)
        pick = self.random
        tensors = list(model.graph.initializer)
        for node in model.graph.node:
            tensors += [each.t for each in node.attribute if each.HasField("t")]
        kind = pick.randrange(8)
        if tensors and kind < 6:
            self._tensor(pick.choice(tensors))
        elif model.graph.node:
            self._node(pick.choice(list(model.graph.node)))
        return bytes(model.SerializeToString())

    def _tensor(self, tensor: Any) -> None:
        pick = self.random
        kind = pick.randrange(7)
        if kind == 0:
            del tensor.dims[:]
            sizes = pick.choice([*SHAPES, [2**62] * 8000, [-(2**63)]])
            tensor.dims.extend(max(-(2**63), min(size, 2**63 - 1)) for size in sizes)
        elif kind == 1:
            tensor.data_type = pick.choice((0, 1, 2, 7, 8, 10, 11, 14, 16, 17, 21, 23, 26, 99, -1))
        elif kind == 2:
            text = pick.choice((*TEXTS[:20], *map(str, NUMBERS), "9" * 5000, "-1", "٣"))
            key = pick.choice(("location", "offset", "length", "checksum"))
            tensor.data_location = pick.choice((0, 1))
            tensor.external_data.add(key=key, value=text)
        elif kind == 3:
            tensor.raw_data = self.bytes(tensor.raw_data)
        elif kind == 4:
            tensor.float_data.extend([1.0, float("nan")])
        elif kind == 5:
            tensor.int32_data.extend([-1, 2**31 - 1])
        else:
            tensor.name = pick.choice([text for text in TEXTS if text.isascii()])

    def _node(self, node: Any) -> None:
        pick = self.random
        text = pick.choice((*TEXTS, repr(["", "a", "b"]), "[" * 500, "'a'", "[1]"))
        kind = pick.randrange(4)
        if kind == 0:
            node.op_type = text
        elif kind == 1:
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text)
        elif kind == 2:
            node.name = text
        else:
            node.input.append(text)


def encode(value: Any, *, sort: bool = False) -> bytes:
    """JSON as a mutation wants it: marked texts are written raw, marked keys a second time."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort)
    text = text.replace(_TWICE, "")
    while (start := text.find(f'"{_RAW}')) >= 0:
        raw, end = json.decoder.scanstring(text, start + 1)
        text = text[:start] + raw[len(_RAW) :] + text[end:]
    return text.encode("utf-8", "surrogatepass")
