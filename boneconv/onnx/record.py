"""boneconv.json of an export: what was merged, and where in the graph it lies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from boneconv import __version__
from boneconv.graphs import Placement
from boneconv.onnx.patching.patch import Written

__all__ = ["encode_export_record", "patched_tensors"]


def patched_tensors(written: Iterable[Written]) -> dict[str, Any]:
    """For each tensor, its digest, that of the base's, and its places in the graph."""
    tensors: dict[str, Any] = {}
    for each in written:
        entry = tensors.setdefault(each.name, {"places": []})
        entry["places"].append(_place(each.place, each.initializer) | {"digest": each.values})
        if each.base is not None:
            entry["base_digest"] = each.base
    return tensors


def encode_export_record(
    *,
    method: str,
    base: Mapping[str, Any],
    adapters: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    tensors: Mapping[str, Any],
    fingerprint_ignored: bool = False,
) -> bytes:
    """The record's bytes: canonical JSON, sorted and indented. No times, paths or worker counts.

    Args:
        method: ``patch``, ``trace``, ``genai`` or ``runtime-adapters``.
        base: Where the base came from.
        adapters: Entries of the adapters.
        options: What else determined the output.
        tensors: What became of each tensor that the adapters change.
        fingerprint_ignored: Whether an adapter was made for another base than this.
    """
    record: dict[str, Any] = {
        "boneconv": __version__,
        "record_version": 1,
        "export": method,
        "numerics": "canonical",
        "digest": "blake3-1MiB",
        "base": dict(base),
        "adapters": [dict(adapter) for adapter in adapters],
        "options": dict(options),
        "tensors": dict(tensors),
    }
    if fingerprint_ignored:
        record["fingerprint_ignored"] = True
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def _place(place: Placement, initializer: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "initializer": initializer or place.initializer.name,
        "dtype": place.initializer.dtype,
        "transposed": place.transposed,
    }
    if not place.is_whole:
        found["start"] = [place.row, place.column]
    return found
