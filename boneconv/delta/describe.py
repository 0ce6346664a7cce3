"""What a delta file has to say of a base, and which of its tensors need a correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import blake3

from boneconv.adapter import Adapter
from boneconv.delta.document import Document, How, ShardEntry, StoredFile, TensorEntry, UpdateEntry
from boneconv.delta.pieces import Subject, rows_per_piece
from boneconv.digest import file_digest, stored_digest
from boneconv.engine.plan import Action, Plan, PlannedTensor, Update
from boneconv.engine.stream import ShardDigests
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.files import Reader
from boneconv.io.safetensors import StoredTensor

__all__ = ["DeltaJob", "describe", "how_restored", "read_head", "subjects_of"]


@dataclass(frozen=True)
class DeltaJob:
    """What a delta file is written from.

    Attributes:
        base: The base.
        plan: The merge's plan.
        adapters: The adapters, in order.
        adapter_digests: The BLAKE3 digests of their weight files.
    """

    base: Checkpoint
    plan: Plan
    adapters: Sequence[Adapter]
    adapter_digests: Sequence[str]


def how_restored(base: Checkpoint, tensor: PlannedTensor) -> How | None:
    """How a tensor of the base is restored; None for one that the base does not have."""
    stored = base.tensors.get(tensor.name)
    if stored is None:
        return None
    if tensor.action is Action.COPY:
        return "copy"
    computed = tensor.action in (Action.MERGE, Action.CAST) and tensor.source == stored
    return "correct" if computed and stored.shape and stored.nbytes else "stored"


def subjects_of(job: DeltaJob, merged: Path) -> dict[str, Subject]:
    """The tensors that are corrected, in the order of the base."""
    planned = {
        tensor.name: (shard, tensor) for shard in job.plan.shards for tensor in shard.tensors
    }
    found = {}
    for name, base in job.base.tensors.items():
        shard, tensor = planned[name]
        if how_restored(job.base, tensor) == "correct":
            path = merged if merged.is_file() else merged / shard.name
            after = StoredTensor(
                path, name, tensor.dtype, tensor.shape, shard.offsets[name], tensor.nbytes
            )
            found[name] = Subject(base, after, tensor.updates)
    return found


def describe(job: DeltaJob, subjects: Mapping[str, Subject], digests: ShardDigests) -> Document:
    """The document; reads what of the base the merge did not read."""
    base = job.base
    planned = {tensor.name: tensor for tensor in job.plan.tensors}
    numbers = {
        id(block): (number, module)
        for number, adapter in enumerate(job.adapters)
        for module, block in adapter.blocks.items()
    }

    def update(each: Update) -> UpdateEntry:
        number, module = numbers[id(each.block)]
        return UpdateEntry(number, module, float(each.scale), float(each.residue))

    def entry(name: str) -> TensorEntry:
        stored, tensor, found = base.tensors[name], planned[name], digests[name]
        how = how_restored(base, tensor)
        make = partial(TensorEntry, stored.dtype, stored.shape)
        if how == "copy":
            return make(found.output, "copy", found.output)
        if how == "stored":
            return make(_digest(stored), "stored")
        before = found.base if tensor.action is Action.MERGE else None
        updates = tuple(update(each) for each in tensor.updates)
        rows = rows_per_piece(subjects[name])
        return make(before or _digest(stored), "correct", found.output, updates, rows)

    return Document(
        adapters=tuple(job.adapter_digests),
        shards=tuple(
            ShardEntry(name, blake3.blake3(read_head(shard.path)).hexdigest(), tuple(shard.tensors))
            for name, shard in base.shards.items()
        ),
        tensors={name: entry(name) for name in base.tensors},
        files=_files(job),
        left_out=tuple(map(str, base.left_out)),
        single_file=base.single_file,
    )


def _files(job: DeltaJob) -> dict[str, StoredFile]:
    """The base's other files; those that the merge copied need not be stored."""
    if job.base.single_file:
        return {}
    names = list(map(str, job.base.side_files))
    if job.base.index_name is not None:
        names.append(job.base.index_name)
    copied = {str(name): path for name, path in job.plan.copies.items()}
    found = {}
    for name in names:
        path = job.base.root / name
        found[name] = StoredFile(file_digest(path), stored=copied.get(name) != path)
    return found


def read_head(path: Path) -> bytes:
    """A safetensors file's header, with its length before it."""
    with Reader(path) as reader:
        length = bytearray(8)
        reader.read_into(memoryview(length), 0)
        head = bytearray(8 + int.from_bytes(length, "little"))
        reader.read_into(memoryview(head), 0)
    return bytes(head)


def _digest(tensor: StoredTensor) -> str:
    with Reader(tensor.path) as reader:
        return stored_digest(tensor, reader)
