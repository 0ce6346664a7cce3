"""Vectors that break the safetensors file itself."""

from __future__ import annotations

import json
from typing import Any

from vector_sources.cases import Bad
from vector_sources.files import PREFIX, packed
from vector_sources.invalid.small_adapter import header_of


def containers() -> dict[str, Bad]:
    """Rules R01 to R04: the safetensors file."""
    header, data = header_of()
    good = packed(header, data)
    text = json.dumps(header, separators=(",", ":"))
    block = f"{PREFIX}q.bone_block"
    twice = text[:-1] + f',"{block}":' + json.dumps(header[block]) + "}"
    deep = "[" * 5000 + "]" * 5000
    span = header[block]["data_offsets"]
    other = {"dtype": "F32", "shape": [2], "data_offsets": [span[1] - 8, span[1]]}
    files = {
        "empty-file": ("R01", "an empty file", b""),
        "short-file": ("R01", "a file of seven bytes", good[:7]),
        "header-bomb": ("R01", "a header length beyond the file", b"\xff" * 8 + good[8:]),
        "header-past-end": ("R01", "a truncated header", good[:64]),
        "header-not-json": ("R02", "a header that is not JSON", packed(text[:-1], data)),
        "header-array": ("R02", "a header that is an array", packed("[]", b"")),
        "header-space": ("R02", "a header that begins with a space", packed(" " + text, data)),
        "header-bom": ("R02", "a byte order mark", packed("\ufeff" + text, data)),
        "header-not-utf8": ("R02", "bytes that are not UTF-8", bad_utf8(good)),
        "header-surrogate": ("R02", "a lone surrogate", packed(text[:-1] + ',"\\ud800":0}', data)),
        "header-duplicate": ("R02", "a tensor named twice", packed(twice, data)),
        "header-nan": ("R02", "NaN, which is not JSON", packed(text[:-1] + ',"x":NaN}', data)),
        "header-deep": ("R02", "five thousand brackets", packed('{"x":' + deep + "}", b"")),
        "metadata-not-strings": (
            "R03",
            "metadata that is not text",
            packed({"__metadata__": {"bone_adapter": {}}}, b""),
        ),
        "entry-unknown-dtype": ("R03", "an unknown dtype", packed(*header_of(dtype="F13"))),
        "entry-extra-member": ("R03", "a fourth member", packed(*header_of(stride=[1]))),
        "entry-negative-size": ("R03", "a negative size", packed(*header_of(shape=[-2, -4]))),
        "entry-fraction": ("R03", "a size that is no integer", packed(*header_of(shape=[2.5, 4]))),
        "entry-huge-shape": (
            "R03",
            "sizes whose product overflows 64 bits",
            packed(*header_of(shape=[2**52, 2**52, 0x1000, 1])),
        ),
        "entry-wrong-span": (
            "R03",
            "bytes that do not fit the shape",
            packed(*header_of(shape=[2, 5])),
        ),
        "data-truncated": ("R04", "missing data", good[:-4]),
        "data-trailing": ("R04", "data that no tensor owns", good + bytes(8)),
        "data-overlap": (
            "R04",
            "overlapping tensors",
            packed(header | {PREFIX + "k.bone_block": other}, data),
        ),
        "data-hole": ("R04", "a hole before the data", packed(*shifted(header, data, 8))),
    }
    return {name: Bad(*rest) for name, rest in files.items()}


def bad_utf8(good: bytes) -> bytes:
    """A file whose header holds a byte that UTF-8 does not know."""
    return good.replace(b"q.bone_block", b"\xff.bone_block", 1)


def shifted(header: dict[str, Any], data: bytes, by: int) -> tuple[dict[str, Any], bytes]:
    """The data moved on, the offsets with it."""
    moved = json.loads(json.dumps(header))
    for name, entry in moved.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
    return moved, bytes(by) + data
