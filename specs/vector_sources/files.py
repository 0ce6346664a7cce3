"""The bytes of safetensors files."""

from __future__ import annotations

import json
from typing import Any

from vector_sources.adapters import Adapter
from vector_sources.tensors import Tensor

PREFIX = "base_model.model."
#: the order in which tensors lie in a file (section 4.5)
LAYOUT = ["I64", "F64", "F32", "I32", "BF16", "F16", "U8", "BOOL"]


def canonical(value: Any) -> str:
    """Canonical JSON (section 4.3), for the numbers that occur here."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def packed(header: Any, data: bytes) -> bytes:
    """A safetensors file of a header (an object, or its text) and its data."""
    if not isinstance(header, str):
        header = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    raw = header.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


def laid_out(tensors: dict[str, Tensor], texts: dict[str, str]) -> tuple[dict[str, Any], bytes]:
    """The header and the data, in the recommended order (section 4.5)."""
    header: dict[str, Any] = {"__metadata__": texts} if texts else {}
    data = b""
    for name in sorted(tensors, key=lambda n: (LAYOUT.index(tensors[n].dtype), n.encode())):
        t = tensors[name]
        span = [len(data), len(data) + len(t.data)]
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": span}
        data += t.data
    return header, data


def file_of(adapter: Adapter) -> tuple[dict[str, Any], bytes]:
    """The header and data of an adapter's file."""
    tensors = {PREFIX + name: t for name, t in adapter.tensors.items()}
    return laid_out(tensors, {"bone_adapter": canonical(adapter.meta), **adapter.texts})
