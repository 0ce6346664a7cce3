"""The plan of an unmerge: with a delta file the base's own files, without one the merged ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NoReturn

from boneconv.delta import DeltaFile, Document, Restoration, TensorEntry, inversion
from boneconv.digest import file_digest
from boneconv.dtypes import FLOATS
from boneconv.engine.plan import Action, Plan, PlannedShard, PlannedTensor, Update
from boneconv.errors import FormatError, InputError, listing
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.pth import PTH_SUFFIXES
from boneconv.io.safetensors import SafetensorsFile
from boneconv.unmerging.matching import Merged, listing_in_order
from boneconv.unmerging.records import RECORD_NAME, MergeRecord

__all__ = ["is_merge_card", "plan_with", "plan_without"]

_README = PurePosixPath("README.md")
_CARD = "Made by boneconv"


def plan_without(merged: Checkpoint, updates: Mapping[str, tuple[Update, ...]]) -> Plan:
    """The merged checkpoint's files, with the base's values.

    The record and a model card of the merge's own are left out.
    """
    shards = tuple(_same_file(name, shard, updates) for name, shard in merged.shards.items())
    if merged.single_file:
        return Plan(shards, {}, {})
    names = list(merged.side_files)
    if merged.index_name is not None:
        names.append(PurePosixPath(merged.index_name))
    copies = {
        name: merged.root / name
        for name in names
        if str(name) != RECORD_NAME and not is_merge_card(merged, name)
    }
    return Plan(shards, copies, {}, merged.left_out)


def is_merge_card(merged: Checkpoint, name: PurePosixPath) -> bool:
    """Whether a file is the model card that a merge wrote."""
    if name != _README:
        return False
    with (merged.root / name).open(encoding="utf-8", errors="replace") as file:
        return _CARD in file.read(1 << 20)


def _same_file(
    name: str, shard: SafetensorsFile, updates: Mapping[str, tuple[Update, ...]]
) -> PlannedShard:
    tensors = []
    for stored in shard.tensors.values():
        if stored.name in updates:
            made = PlannedTensor(
                stored.name, stored.dtype, Action.MERGE, stored, updates[stored.name], inversion
            )
        else:
            made = PlannedTensor(stored.name, stored.dtype, Action.COPY, stored)
        tensors.append(made)
    if shard.path.suffix in PTH_SUFFIXES:
        return PlannedShard.lay_out_pth(name, tensors)
    return PlannedShard.like(shard, name, tensors)


def plan_with(
    merged: Checkpoint, record: MergeRecord | None, delta: DeltaFile, adapters: Sequence[Merged]
) -> Plan:
    """The base's files as the delta file describes them.

    Raises:
        InputError: The adapters are not those that were merged.
        FormatError: The delta file was made beside another merge, or is damaged, or a file of the
            merged folder has changed since.
    """
    document = delta.document
    found = tuple(each.digest for each in adapters)
    if found != document.adapters:
        raise InputError(
            "the delta file was made with other adapters, or in another order",
            path=delta.path,
            expected=listing_in_order(document.adapters),
            found=listing_in_order(found),
        )
    _check_merged(merged, record, delta)
    shards = tuple(
        _restored_file(merged, delta, adapters, each.name, each.tensors) for each in document.shards
    )
    copies, texts = _files(merged, delta)
    return Plan(shards, copies, texts, tuple(map(PurePosixPath, document.left_out)))


def _check_merged(merged: Checkpoint, record: MergeRecord | None, delta: DeltaFile) -> None:
    """Looks, before anything is written, whether the delta file belongs to the checkpoint."""
    if merged.single_file != delta.document.single_file:
        _refuse(delta, "it was made beside a folder, or this is one and that was a file")
    for name, entry in delta.document.tensors.items():
        if entry.how == "stored":
            continue
        stored = merged.tensors.get(name)
        if stored is None or stored.shape != entry.shape:
            _refuse(delta, f"they differ in {name!r}")
        if entry.how == "copy" and stored.dtype != entry.dtype:
            _refuse(delta, f"they differ in {name!r}")
        if entry.how == "correct" and stored.dtype not in FLOATS:
            _refuse(delta, f"they differ in {name!r}")
        known = record.tensors.get(name) if record is not None else None
        if known is not None and known.digest != entry.merged:
            _refuse(delta, f"they differ in {name!r}")


def _refuse(delta: DeltaFile, why: str) -> NoReturn:
    raise FormatError(
        f"the delta file was made beside another merged checkpoint: {why}",
        path=delta.path,
        hint="Give the one that was written by the same merge",
    )


def _restored_file(
    merged: Checkpoint,
    delta: DeltaFile,
    adapters: Sequence[Merged],
    name: str,
    names: Sequence[str],
) -> PlannedShard:
    head = delta.head(name)
    tensors = tuple(_restored(merged, delta, adapters, each) for each in names)
    offsets, end = {}, len(head)
    for tensor in tensors:
        offsets[tensor.name] = end
        end += tensor.nbytes
    return PlannedShard(name, tensors, head, offsets, end)


def _restored(
    merged: Checkpoint, delta: DeltaFile, adapters: Sequence[Merged], name: str
) -> PlannedTensor:
    entry = delta.document.tensors[name]
    if entry.how == "stored":
        return PlannedTensor(name, entry.dtype, Action.COPY, delta.stored(name))
    if entry.how == "copy":
        return PlannedTensor(name, entry.dtype, Action.COPY, merged.tensors[name])
    return PlannedTensor(
        name,
        entry.dtype,
        Action.MERGE,
        merged.tensors[name],
        _updates(delta.document, entry, adapters),
        Restoration(delta.correction(name), entry.rows),
    )


def _updates(
    document: Document, entry: TensorEntry, adapters: Sequence[Merged]
) -> tuple[Update, ...]:
    try:
        return tuple(
            Update(adapters[each.adapter].adapter.blocks[each.module], each.scale, each.residue)
            for each in entry.updates
        )
    except KeyError as error:
        raise InputError(
            f"the adapter has no block of {error.args[0]!r}, which was merged",
            hint="Is its configuration the one that it was merged with?",
        ) from error


def _files(
    merged: Checkpoint, delta: DeltaFile
) -> tuple[dict[PurePosixPath, Path], dict[PurePosixPath, bytes]]:
    """The base's other files: copied from the merged folder, and out of the delta file."""
    copies: dict[PurePosixPath, Path] = {}
    texts: dict[PurePosixPath, bytes] = {}
    changed = []
    for name, file in delta.document.files.items():
        path = PurePosixPath(name)
        if file.stored:
            texts[path] = delta.file(name)
        elif (merged.root / name).is_file() and file_digest(merged.root / name) == file.digest:
            copies[path] = merged.root / name
        else:
            changed.append(name)
    if changed:
        raise FormatError(
            f"files of the merged folder have changed since the merge: {listing(changed)}",
            path=merged.root,
            hint="Put back what the merge wrote",
        )
    return copies, texts
