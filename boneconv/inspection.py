"""What an adapter or a checkpoint holds, from headers alone."""

from __future__ import annotations

import math
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from boneconv.adapter import Adapter
from boneconv.config import CONFIG_NAME, Variant
from boneconv.errors import NotABoneAdapterError
from boneconv.formats import load_adapter, read_adapter, says_native
from boneconv.io.checkpoint import Checkpoint, open_checkpoint
from boneconv.io.pth import PTH_SUFFIXES

__all__ = ["AdapterSummary", "BlockSummary", "CheckpointSummary", "ShardSummary", "inspect"]


@dataclass(frozen=True)
class BlockSummary:
    """One adapted module: its name, block shape, dtype, number of parameters, and rank."""

    module: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    rank: int


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter.

    Attributes:
        path: Where it lies.
        format: Its format.
        variant: ``bone``, ``bat`` or ``mini``.
        axis: The axis that BAT's blocks run along; None for the other variants.
        rank: The rank r, the largest where modules differ.
        scale: The strength that the adapter itself asks for.
        base: The base it names.
        fingerprint: The root over the digests of the base's tensors, where it records them.
        dtypes: The dtypes of its tensors.
        parameters: Numbers in all its tensors.
        blocks: Its blocks.
        saved: Names of tensors that replace the base's.
        unknown_fields: Fields of its configuration that boneconv does not know.
    """

    path: Path
    format: str
    variant: str
    axis: str | None
    rank: int
    scale: float
    base: str | None
    fingerprint: str | None
    dtypes: tuple[str, ...]
    parameters: int
    blocks: tuple[BlockSummary, ...]
    saved: tuple[str, ...]
    unknown_fields: tuple[str, ...]


@dataclass(frozen=True)
class ShardSummary:
    """A weight file: its name, number of tensors and bytes."""

    name: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class CheckpointSummary:
    """A checkpoint.

    Attributes:
        path: Where it lies.
        tensors: How many tensors it has.
        parameters: Numbers in all of them.
        dtypes: How many tensors have each dtype.
        nbytes: Bytes of its weight files.
        shards: Its weight files.
        side_files: Its other files.
        left_out: Other copies of the weights, which a merge leaves out.
    """

    path: Path
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    nbytes: int
    shards: tuple[ShardSummary, ...]
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]


def inspect(path: str | os.PathLike[str]) -> AdapterSummary | CheckpointSummary:
    """Summarises an adapter or a checkpoint.

    Args:
        path: A folder or a file, or an adapter's Hub id.

    Raises:
        InputError: One of its kinds: nothing is there, or it is malformed.
    """
    local = Path(path)
    if not local.exists():
        return _adapter(load_adapter(path))
    folder = local if local.is_dir() else local.parent
    if (folder / CONFIG_NAME).is_file() or says_native(local):
        return _adapter(read_adapter(local))
    if local.suffix in PTH_SUFFIXES:
        with suppress(NotABoneAdapterError):
            return _adapter(read_adapter(local))
    return _checkpoint(open_checkpoint(local), local)


def _adapter(adapter: Adapter) -> AdapterSummary:
    blocks = tuple(
        BlockSummary(b.module, b.tensor.shape, b.tensor.dtype, b.parameters, b.rank)
        for b in adapter.blocks.values()
    )
    saved = adapter.saved.values()
    dtypes = {b.dtype for b in blocks} | {tensor.dtype for tensor in saved}
    return AdapterSummary(
        path=adapter.path,
        format=adapter.format,
        variant=str(adapter.config.variant),
        axis=str(adapter.config.axis) if adapter.config.variant is Variant.BAT else None,
        rank=adapter.config.r,
        scale=adapter.scale,
        base=adapter.config.base_model_name_or_path,
        fingerprint=adapter.fingerprint,
        dtypes=tuple(sorted(dtypes)),
        parameters=sum(b.parameters for b in blocks) + sum(math.prod(t.shape) for t in saved),
        blocks=blocks,
        saved=tuple(adapter.saved),
        unknown_fields=tuple(sorted(adapter.config.unknown)),
    )


def _checkpoint(checkpoint: Checkpoint, path: Path) -> CheckpointSummary:
    tensors = checkpoint.tensors.values()
    shards = tuple(
        ShardSummary(name, len(shard.tensors), shard.path.stat().st_size)
        for name, shard in checkpoint.shards.items()
    )
    return CheckpointSummary(
        path=path,
        tensors=len(tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        dtypes=dict(Counter(tensor.dtype for tensor in tensors)),
        nbytes=sum(shard.nbytes for shard in shards),
        shards=shards,
        side_files=tuple(map(str, checkpoint.side_files)),
        left_out=tuple(map(str, checkpoint.left_out)),
    )
