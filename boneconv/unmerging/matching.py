"""What has to be undone, without a delta file: which blocks belong to which merged tensor.

Only what is certain is undone. A tensor whose base value is gone, or may have been another than the
formula gives, is refused by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from boneconv.adapter import Adapter
from boneconv.digest import file_digest
from boneconv.dtypes import FLOATS
from boneconv.engine.plan import Action, Update
from boneconv.errors import FormatError, InputError, NameMatchError, UsageError, listing
from boneconv.formats import read_adapter
from boneconv.io.checkpoint import Checkpoint
from boneconv.names import resolve, trained_on
from boneconv.unmerging.records import MergeRecord

__all__ = ["Merged", "find_updates", "listing_in_order", "read_adapters"]

_DEQUANTISED = "dequantised"


@dataclass(frozen=True)
class Merged:
    """An adapter that was merged, and how strongly.

    Attributes:
        adapter: The adapter.
        scale: S in ``W + S (W' - W)``, beside the adapter's own.
        digest: The BLAKE3 digest of its weights file.
    """

    adapter: Adapter
    scale: float
    digest: str

    def factor(self) -> tuple[float, float]:
        """The product with the adapter's own scale: a binary64 and what it lacks."""
        product = Fraction(self.scale) * Fraction(self.adapter.scale)
        return float(product), float(product - Fraction(float(product)))


def read_adapters(
    paths: Sequence[Path], record: MergeRecord | None, scale: float | None
) -> list[Merged]:
    """The adapters with the scales of the merge.

    Raises:
        InputError: They are not those of the record, or not in its order.
        UsageError: The record says another scale.
    """
    read = [read_adapter(path) for path in paths]
    digests = [file_digest(adapter.weights) for adapter in read]
    if record is None:
        given = 1.0 if scale is None else scale
        return [Merged(a, given, digest) for a, digest in zip(read, digests, strict=True)]
    recorded = [each.digest for each in record.adapters]
    if digests != recorded:
        in_order = sorted(digests) == sorted(recorded)
        raise InputError(
            "these are not the adapters that were merged"
            + (", in the order of the merge" if in_order else ""),
            path=record.path,
            expected=f"{len(recorded)}, by the digests of their weights: "
            f"{listing_in_order(recorded)}",
            found=listing_in_order(digests),
            hint="Give all of them in the order of the merge: ADAPTER, then --adapter MORE",
        )
    if scale is not None and any(each.scale != scale for each in record.adapters):
        raise UsageError(
            "the merge had another scale",
            path=record.path,
            expected=", ".join(f"{each.scale:g}" for each in record.adapters),
            found=f"{scale:g}",
            hint="Leave out --scale",
        )
    return [
        Merged(a, each.scale, each.digest) for a, each in zip(read, record.adapters, strict=True)
    ]


def listing_in_order(digests: Sequence[str]) -> str:
    """The first digits of digests, in their order."""
    return ", ".join(digest[:12] for digest in digests)


@dataclass
class _Found:
    """Tensors of the merged checkpoint that adapters know."""

    updates: dict[str, list[Update]] = field(default_factory=lambda: defaultdict(list))
    saved: set[str] = field(default_factory=set)


def find_updates(
    merged: Checkpoint, record: MergeRecord | None, adapters: Sequence[Merged]
) -> Mapping[str, tuple[Update, ...]]:
    """The updates that were merged into each tensor, in order.

    Raises:
        NameMatchError: A block has no home in the checkpoint.
        FormatError: The record contradicts the checkpoint or the adapters.
        InputError: The base cannot be restored without a delta file; it names the tensors.
    """
    found = _Found()
    for each in adapters:
        _match(merged, each, found)
    lost = _lost_by_record(record, found) if record else {"replaced": found.saved}
    reasons = [f"{reason}: {listing(sorted(names))}" for reason, names in lost.items() if names]
    if reasons:
        raise InputError(
            f"these tensors of the base are lost: {'; '.join(reasons)}",
            path=merged.root,
            hint="Take the base itself: no merge restores quantised weights"
            if _DEQUANTISED in lost
            else "Give the --delta file that `boneconv merge --keep-delta` wrote",
        )
    if record is not None:
        _check_record(record, merged, found)
    odd = [name for name in found.updates if merged.tensors[name].dtype not in FLOATS]
    if odd:
        raise FormatError(f"no floating tensors: {listing(odd)}", path=merged.root)
    return {name: tuple(updates) for name, updates in found.updates.items()}


def _match(merged: Checkpoint, each: Merged, found: _Found) -> None:
    adapter = each.adapter
    blocks = {f"{block.module}.weight": block for block in adapter.blocks.values()}
    homes = resolve(
        blocks.keys() | adapter.saved.keys(),
        merged.tensors.keys(),
        merged.config,
        optional=adapter.saved.keys() - blocks.keys(),
        architectures=trained_on(adapter.config.task_type, adapter.config.auto_mapping),
    )
    absent = [name for name in homes.missing if name in blocks]
    if absent:
        raise NameMatchError(
            f"{len(absent)} of its blocks have no home in the checkpoint: {listing(absent)}",
            path=adapter.weights,
            hint="Was this adapter merged into it?",
        )
    scale, residue = each.factor()
    for name, home in homes.found.items():
        if name in blocks:
            found.updates[home].append(Update(blocks[name], scale, residue))
        if name in adapter.saved:
            found.saved.add(home)
    found.saved |= set(homes.missing)


def _lost_by_record(record: MergeRecord, found: _Found) -> dict[str, set[str]]:
    """Tensors whose base values the merged checkpoint does not determine, by reason.

    A tensor that was merged into may not have been the base's: PEFT saves the weight below some
    blocks, and a head (which stands outside the numbered layers) that was tied to an embedding had
    that tensor's values.
    """
    lost: dict[str, set[str]] = defaultdict(set)
    values = defaultdict(set)
    for name, tensor in record.tensors.items():
        values[tensor.base_digest or tensor.digest].add(name)
    for name, tensor in record.tensors.items():
        if tensor.dequantised:
            lost[_DEQUANTISED].add(name)
        elif tensor.action is Action.REPLACE:
            lost["replaced"].add(name)
        elif tensor.action is Action.ADD:
            lost["added by the adapter"].add(name)
        elif tensor.action is Action.CAST or (
            tensor.action is Action.MERGE and record.dtype != "keep"
        ):
            lost[f"cast (--dtype {record.dtype})"].add(name)
        elif tensor.action is Action.MERGE and name in found.saved:
            lost["maybe replaced before the merge"].add(name)
        elif _may_have_been_tied(name) and len(values[tensor.base_digest or ""]) > 1:
            lost["maybe tied to another, and absent"].add(name)
    return lost


def _may_have_been_tied(name: str) -> bool:
    return not any(segment.isdigit() for segment in name.split("."))


def _check_record(record: MergeRecord, merged: Checkpoint, found: _Found) -> None:
    if set(record.tensors) != set(merged.tensors):
        differ = sorted(set(record.tensors) ^ set(merged.tensors))
        raise FormatError(
            f"the record is of another checkpoint: they differ in {listing(differ)}",
            path=record.path,
        )
    recorded = {n for n, tensor in record.tensors.items() if tensor.action is Action.MERGE}
    if recorded != set(found.updates):
        raise FormatError(
            "the record names other merged tensors than the adapters have blocks for: "
            f"{listing(sorted(recorded ^ set(found.updates)))}",
            path=record.path,
        )
