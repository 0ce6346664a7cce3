"""Adapter tensors without a home in the base: an error, never a warning."""

from __future__ import annotations

import re
from collections.abc import Iterable

from boneconv.adapter import Adapter
from boneconv.errors import NameMatchError, listing
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.safetensors import StoredTensor

__all__ = ["lost_error"]

_OF_ONE_EXPERT = re.compile(r"(?P<layer>(?:.*?\.)?\d+)\.(?:.+\.)?experts\.\d+\..+")
_OF_ALL_EXPERTS = re.compile(r"(?P<layer>(?:.*?\.)?\d+)\.(?:.+\.)?experts\.\D.*")


def lost_error(adapter: Adapter, names: list[str], base: Checkpoint) -> NameMatchError:
    """The error for tensors of an adapter that the base has no place for.

    Args:
        adapter: The adapter.
        names: Its tensors without a home.
        base: The base.
    """
    count = f"{len(names)} of its {len(adapter.blocks.keys() | adapter.saved.keys())} tensors"
    fused = _fused_experts(names, base.tensors.values())
    if fused:
        return NameMatchError(
            f"{count} belong to single experts, which the base stores in one: {listing(names)}",
            path=adapter.weights,
            found=listing([f"{tensor.name} {list(tensor.shape)}" for tensor in fused]),
            hint="Merge into a checkpoint that stores each expert's weights by themselves, as the "
            "adapter's model had them",
        )
    return NameMatchError(
        f"{count} have no home in the base: {listing(names)}",
        path=adapter.weights,
        found=f"in the base, for example, {listing(sorted(base.tensors)[:3])}",
        hint="Is this the base that the adapter was trained on?",
    )


def _fused_experts(names: Iterable[str], tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """The stacked tensors of layers of which an adapter knows single experts."""
    layers = {m["layer"] for m in map(_OF_ONE_EXPERT.fullmatch, names) if m is not None}
    found = []
    for tensor in tensors:
        match = _OF_ALL_EXPERTS.fullmatch(tensor.name) if len(tensor.shape) > 2 else None
        if match is not None and match["layer"] in layers:
            found.append(tensor)
    return found
