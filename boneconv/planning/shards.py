"""From accounts to shards: the base's own files and order, or new ones of a given size."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from boneconv.dtypes import FLOATS
from boneconv.engine.plan import Action, PlannedShard, PlannedTensor
from boneconv.errors import UsageError
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.safetensors import SafetensorsFile
from boneconv.io.weight_files import single_of
from boneconv.planning.accounts import Accounts, Addition
from boneconv.planning.quantised import Dequantised

__all__ = ["encode_index", "parse_size", "plan_shards"]

#: What loaders want to find in the header of a file that holds torch's tensors.
_METADATA = {"format": "pt"}
_AS_STORED = Dequantised()
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)([iI]?)[bB]?")


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` (10^9) or ``5GiB`` (2^30); raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    size = 0.0
    if match is not None:
        power = " kmgt".index(match[2].lower() or " ")
        size = float(match[1]) * (1024 if match[3] else 1000) ** power
    if not 1 <= size < 2**63:
        raise UsageError(f"not a size: {text!r}", expected="a size such as 5GB or 500MiB")
    return int(size)


def plan_shards(
    base: Checkpoint,
    accounts: Accounts,
    dequantised: Dequantised = _AS_STORED,
    *,
    dtype: str | None,
    max_shard_size: int | None,
) -> tuple[PlannedShard, ...]:
    """Plans the weight files.

    Args:
        base: The base.
        accounts: What happens to its tensors.
        dequantised: How its FP8 weights are dequantised.
        dtype: The safetensors dtype of every floating tensor; None to keep each one's own.
        max_shard_size: The most bytes of tensors in one file; None to keep the base's files. A
            tensor that is larger has a file of its own.
    """
    gone = set(dequantised.dropped)
    planned = {
        shard: [
            _planned(base, accounts, name, dtype, dequantised=name in dequantised.weights)
            for name in base.shards[shard].tensors
            if name not in gone
        ]
        for shard in base.shards
    }
    for name, addition in accounts.added.items():
        home = base.shard_of[addition.beside] if addition.beside else list(base.shards)[-1]
        eight = addition.beside in dequantised.weights
        planned[home].append(_added(base, name, addition, dtype, dequantised=eight))
    planned = {
        shard: [_dequantising(tensor, base, dequantised) for tensor in tensors]
        for shard, tensors in planned.items()
    }
    if max_shard_size is not None:
        everything = [tensor for tensors in planned.values() for tensor in tensors]
        return _split(base, everything, max_shard_size)
    return tuple(
        _same_file(base.shards[name], base.written_name(name), tensors)
        for name, tensors in planned.items()
        if tensors or not gone.intersection(base.shards[name].tensors)
    )


def encode_index(base: Checkpoint, shards: Iterable[PlannedShard]) -> bytes | None:
    """The index of planned shards, with the base's metadata; None where it stays as it is."""
    shards = tuple(shards)
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    size = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    metadata: dict[str, Any] = dict(base.index.get("metadata") or {})
    old_map: Mapping[str, str] = base.index.get("weight_map", {})
    old_size = sum(tensor.nbytes for tensor in base.tensors.values())
    if weight_map == {**base.shard_of} and size == old_size and old_map:
        return None
    metadata["total_size"] = size
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += _new_parameters(base, shards)
    order = {name: place for place, name in enumerate(old_map)}
    ordered = sorted(weight_map.items(), key=lambda item: order.get(item[0], len(order)))
    index = {**base.index, "metadata": metadata, "weight_map": dict(ordered)}
    return (json.dumps(index, indent=2) + "\n").encode()


def _planned(
    base: Checkpoint, accounts: Accounts, name: str, dtype: str | None, *, dequantised: bool
) -> PlannedTensor:
    stored = base.tensors[name]
    target = _target(stored.dtype, dtype, dequantised=dequantised)
    source = accounts.replaced.get(name, stored)
    if name in accounts.updates:
        return PlannedTensor(name, target, Action.MERGE, source, tuple(accounts.updates[name]))
    if name in accounts.replaced:
        if source.dtype not in FLOATS:
            target = source.dtype
        return PlannedTensor(name, target, Action.REPLACE, source)
    action = Action.COPY if target == stored.dtype else Action.CAST
    return PlannedTensor(name, target, action, stored)


def _added(
    base: Checkpoint, name: str, addition: Addition, dtype: str | None, *, dequantised: bool
) -> PlannedTensor:
    like = base.tensors[addition.beside].dtype if addition.beside else _usual_dtype(base)
    if addition.keeps_dtype:
        like = addition.source.dtype
    action = Action.MERGE if addition.updates else Action.ADD
    target = _target(like, dtype, dequantised=dequantised)
    return PlannedTensor(name, target, action, addition.source, addition.updates)


def _target(stored: str, wanted: str | None, *, dequantised: bool = False) -> str:
    is_float = stored in FLOATS or dequantised
    return wanted if wanted is not None and is_float else stored


def _dequantising(
    planned: PlannedTensor, base: Checkpoint, dequantised: Dequantised
) -> PlannedTensor:
    """The tensor with what dequantises its source, where that is an FP8 weight of the base."""
    how = dequantised.weights.get(planned.source.name)
    if how is None or planned.source is not base.tensors[planned.source.name]:
        return planned
    return replace(planned, kernel=how, reads=() if how.scale is None else (how.scale,))


def _usual_dtype(base: Checkpoint) -> str:
    """The float dtype that most of the base's tensors have."""
    counts = Counter(t.dtype for t in base.tensors.values() if t.dtype in FLOATS)
    return counts.most_common(1)[0][0] if counts else "F32"


def _same_file(old: SafetensorsFile, name: str, tensors: list[PlannedTensor]) -> PlannedShard:
    """The base's file with other values; its header byte for byte where nothing in it changes."""
    if old.data_start == 0:
        metadata = old.metadata if name == old.path.name else _METADATA
        return PlannedShard.lay_out(name, tensors, metadata)
    if [(t.name, t.dtype, t.shape) for t in tensors] != [
        (t.name, t.dtype, t.shape) for t in old.tensors.values()
    ]:
        return PlannedShard.lay_out(name, tensors, old.metadata)
    return PlannedShard.like(old, name, tensors)


def _split(base: Checkpoint, tensors: list[PlannedTensor], limit: int) -> tuple[PlannedShard, ...]:
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    stem = _stem(base)
    first = next(iter(base.shards.values()))
    metadata = _METADATA if first.data_start == 0 and not base.single_file else first.metadata
    names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = [f"{stem}.safetensors"]
    return tuple(
        PlannedShard.lay_out(name, group, metadata)
        for name, group in zip(names, groups, strict=True)
    )


def _stem(base: Checkpoint) -> str:
    """``model`` or ``diffusion_pytorch_model``: what the base's own files begin with."""
    first = single_of(base.index_name) if base.index_name else next(iter(base.shards))
    return base.written_name(first).removesuffix(".safetensors")


def _new_parameters(base: Checkpoint, shards: Iterable[PlannedShard]) -> int:
    after = sum(math.prod(tensor.shape) for shard in shards for tensor in shard.tensors)
    return after - sum(math.prod(tensor.shape) for tensor in base.tensors.values())
