"""Digests of tensors, and fingerprints of bases."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from blake3 import blake3

from vector_sources.files import canonical
from vector_sources.tensors import WIDTHS, Tensor

LEAF = 1 << 20


def digest(dtype: str, shape: Iterable[int], data: bytes) -> str:
    """The digest of a tensor (section 9.1)."""
    leaves = [blake3(data[i : i + LEAF]).digest() for i in range(0, len(data), LEAF)]
    sizes = "[" + ",".join(str(size) for size in shape) + "]"
    head = f"bone-adapter tensor 1\n{dtype}\n{sizes}\n{len(leaves)}\n"
    return blake3(head.encode("ascii") + b"".join(leaves)).hexdigest()


def marked(meta: dict[str, Any], base: dict[str, Tensor]) -> dict[str, Any]:
    """Metadata with the fingerprint of a base (section 9)."""
    meta, rows = json.loads(json.dumps(meta)), []
    for module, entry in meta["modules"].items():
        w = base[f"{module}.weight"]
        entry |= {"base_dtype": w.dtype, "base_shape": list(w.shape)}
        entry["base_digest"] = digest(w.dtype, w.shape, w.data)
        row = [f"{module}.weight", w.dtype, list(w.shape), entry["base_digest"]]
        rows.append(row)
    rows.sort(key=lambda row: row[0].encode())
    root = blake3(b"bone-adapter root 1\n" + canonical(rows).encode()).hexdigest()
    return meta | {"fingerprint": f"blake3-1m:{root}"}


def digests() -> list[dict[str, Any]]:
    """Digests of long tensors; byte i of each is i modulo 251."""
    rows = []
    sizes = [("F32", [0]), ("U8", [1]), ("BF16", [3, 5]), ("U8", [LEAF]), ("BF16", [LEAF // 2 + 1])]
    for dtype, shape in [*sizes, ("F32", [768, 1024]), ("BF16", [3, 7, 1, 1, 99991])]:
        count = math.prod(shape) * WIDTHS[dtype]
        data = (bytes(range(251)) * (count // 251 + 1))[:count]
        name = f"digests/{dtype}-{'x'.join(map(str, shape))}"
        row = {"name": name, "dtype": dtype, "shape": shape, "bytes": count}
        rows.append(row | {"digest": digest(dtype, shape, data)})
    return rows
