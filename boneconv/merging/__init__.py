"""Merging adapters into a checkpoint: plan from headers alone, then stream.

`accounts` finds a home for every adapter tensor, `shards` lays the result out in files, the engine
writes them. `plan_merge` stops before anything is written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from boneconv.delta import DeltaJob
from boneconv.digest import file_digest
from boneconv.dtypes import by_cli_name, cli_name
from boneconv.engine.commit import carry_out
from boneconv.engine.device import check_device
from boneconv.engine.memory import predict_peak
from boneconv.engine.plan import Action, Plan, PlannedShard
from boneconv.engine.stream import ShardDigests
from boneconv.errors import NonFiniteError, UsageError
from boneconv.formats import read_adapter
from boneconv.formats.native import Violation
from boneconv.io.checkpoint import Checkpoint, open_checkpoint
from boneconv.io.hub import ADAPTER, BASE, Source, locate
from boneconv.io.pth import PTH_SUFFIXES
from boneconv.io.staging import check_free
from boneconv.merging.accounts import Accounts, Strength, settle
from boneconv.merging.config_edits import ConfigEdits
from boneconv.merging.files import plan_files
from boneconv.merging.kept_delta import KeptDelta, check_place
from boneconv.merging.native_rules import mismatches, numbered
from boneconv.merging.record import (
    RECORD_NAME,
    adapter_entry,
    encode_record,
    record_size,
    source_entry,
)
from boneconv.merging.shards import parse_size, plan_shards

__all__ = ["MergePlan", "MergeResult", "Progress", "merge", "plan_merge"]

PathLike = str | os.PathLike[str]


class Progress(Protocol):
    """Is told how far a merge is."""

    def start(self, total: int) -> None:
        """The merge will write ``total`` bytes of tensors."""
        ...

    def advance(self, nbytes: int) -> None:
        """It wrote ``nbytes`` more; called from several threads."""
        ...


@dataclass(frozen=True)
class MergePlan:
    """What a merge would do.

    Attributes:
        base: Where the base came from.
        adapters: Where each adapter came from.
        plan: Every tensor and file to write.
        accounts: What happens to each tensor, and why.
        peak_memory: Predicted peak of resident memory, in bytes.
    """

    base: Source
    adapters: tuple[Source, ...]
    strengths: tuple[Strength, ...]
    plan: Plan
    accounts: Accounts
    peak_memory: int

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have each action."""
        return {str(action): len(self.plan.by_action(action)) for action in Action}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        unknown = (
            f"{source.given}: unknown configuration fields kept: "
            f"{', '.join(sorted(strength.adapter.config.unknown))}"
            for source, strength in zip(self.adapters, self.strengths, strict=True)
            if strength.adapter.config.unknown
        )
        left_out = self.plan.left_out
        stale = [f"left out: {', '.join(map(str, left_out))}"] if left_out else []
        return (*self.accounts.notes, *unknown, *stale)


@dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
        out: The merged checkpoint.
        record: Its record, a JSON file.
        counts: How many tensors were merged, replaced, added, cast and copied.
        nbytes: Bytes written.
        left_out: Files of the base that the output does not have.
        notes: What the user should know.
        delta: The delta file that was kept.
    """

    out: Path
    record: Path
    counts: dict[str, int]
    nbytes: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    delta: Path | None = None


@dataclass(frozen=True)
class _Options:
    dtype: str | None
    max_shard_size: int | None
    card: bool

    def record(self) -> dict[str, Any]:
        dtype = "keep" if self.dtype is None else cli_name(self.dtype)
        return {"dtype": dtype, "max_shard_size": self.max_shard_size}


def merge(
    base: PathLike,
    adapter: PathLike,
    out: PathLike,
    *,
    more: Sequence[PathLike] = (),
    scale: float = 1.0,
    dtype: str = "keep",
    max_shard_size: str | None = None,
    device: str = "cpu",
    workers: int | None = None,
    card: bool = True,
    allow_base_mismatch: bool = False,
    keep_delta: PathLike | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Merges one or more Bone, BAT or mini adapters into a checkpoint.

    Memory is bounded whatever the model's size, and ``out`` appears whole or not at all. The bytes
    are the canonical merge's: every weight is the exact value rounded once (specification, section
    "Numerics"), the same for every device and number of workers.

    Args:
        base: A folder, a ``.safetensors`` or ``.pth`` file, or a Hub id ``owner/name[@revision]``.
        adapter: The same, for the adapter.
        out: A folder for a folder, a file for a file.
        more: Further adapters, applied in order after the first.
        scale: S in ``W + S (W' - W)``, for every adapter.
        dtype: ``keep``, or ``float32``, ``bfloat16``, ``float16`` for every floating tensor.
        max_shard_size: Such as ``5GB``: lay the tensors out anew; absent: keep the base's files.
        device: ``cpu``, or a torch device such as ``cuda``.
        workers: Threads that compute; by default one for each usable core.
        card: Whether to write a model card in place of the base's README.md.
        allow_base_mismatch: Whether to go on where a native adapter's fingerprint says that it was
            made for another base; the result's notes then say so.
        keep_delta: A file to keep what `boneconv.unmerge` needs to restore every byte of the base.
        force: Whether to replace ``out``.
        progress: Is told how far the merge is.

    Raises:
        BaseMismatchError: An adapter's fingerprint is not that of the base; it names the tensors.
        InputError: One of its kinds, for every fault in the input; nothing is left behind.
        MachineError: The disk or the network failed; running again goes on from there.
    """
    target = Path(out)
    check_free(target, force=force)
    check_device(device)
    planned = plan_merge(
        base,
        adapter,
        more=more,
        scale=scale,
        dtype=dtype,
        max_shard_size=max_shard_size,
        workers=workers,
        card=card,
    )
    is_file = planned.base.path.is_file()
    _check_target(target, planned, is_file=is_file)
    plan = _pth_plan(planned.plan) if target.suffix in PTH_SUFFIXES else planned.plan
    options = _Options(_dtype(dtype), _size(max_shard_size), card)
    adapters = [
        adapter_entry(strength, source, file_digest(strength.adapter.weights))
        for strength, source in zip(planned.strengths, planned.adapters, strict=True)
    ]
    record_name = f"{target.name}.{RECORD_NAME}" if is_file else RECORD_NAME
    advance = progress.advance if progress is not None else lambda nbytes: None
    kept: KeptDelta | None = None
    if keep_delta is not None:
        check_place(Path(keep_delta), target, planned.base.path, force=force)
        job = DeltaJob(
            open_checkpoint(planned.base.path),
            plan,
            [strength.adapter for strength in planned.strengths],
            [entry["blake3"] for entry in adapters],
        )
        kept = KeptDelta(Path(keep_delta), job, workers or usable_cores(), force, advance)
    if progress is not None:
        work = sum(tensor.nbytes for tensor in plan.tensors)
        progress.start(work + (kept.work if kept is not None else 0))
    strangers: list[Violation] = []

    def record(digests: ShardDigests) -> bytes:
        """Checks the fingerprints, before anything is published, and makes the record."""
        strangers.extend(mismatches(planned.strengths, planned.accounts, plan, digests))
        if strangers and not allow_base_mismatch:
            raise strangers[0].error()
        return encode_record(
            plan,
            digests,
            base=source_entry(planned.base),
            adapters=adapters,
            options=options.record(),
            fingerprint_ignored=bool(strangers),
        )

    try:
        carry_out(
            plan,
            target,
            identity=json.dumps([adapters, options.record()]).encode(),
            record=record,
            record_name=record_name,
            is_file=is_file,
            force=force,
            workers=workers or usable_cores(),
            device=device,
            advance=advance,
            before_publish=kept,
        )
    except NonFiniteError as error:
        raise numbered(error, planned.strengths) from error
    return MergeResult(
        out=target,
        record=target.with_name(record_name) if is_file else target / record_name,
        counts=planned.counts,
        nbytes=plan.total_bytes,
        left_out=tuple(map(str, planned.plan.left_out)),
        notes=(*planned.notes, *(violation.message for violation in strangers)),
        delta=None if kept is None else kept.file,
    )


def plan_merge(
    base: PathLike,
    adapter: PathLike,
    *,
    more: Sequence[PathLike] = (),
    scale: float = 1.0,
    dtype: str = "keep",
    max_shard_size: str | None = None,
    workers: int | None = None,
    card: bool = True,
) -> MergePlan:
    """What `merge` would do, from headers alone; the arguments and errors are its own."""
    options = _Options(_dtype(dtype), _size(max_shard_size), card)
    if not math.isfinite(scale):
        raise UsageError("the scale is not finite", found=scale, hint="Give a number such as 0.5")
    base_source = locate(base, BASE)
    sources = tuple(locate(given, ADAPTER) for given in (adapter, *more))
    strengths = tuple(Strength(read_adapter(source.path), scale) for source in sources)
    checkpoint = open_checkpoint(base_source.path)
    config = _config(checkpoint)
    accounts = settle(checkpoint, config, strengths)
    shards = plan_shards(
        checkpoint, accounts, dtype=options.dtype, max_shard_size=options.max_shard_size
    )
    _edit_config(config, accounts, options)
    plan = plan_files(
        checkpoint, shards, config, strengths, base_source, sources, card=options.card
    )
    recorded = record_size(
        plan,
        base=source_entry(base_source),
        adapters=[adapter_entry(*pair) for pair in zip(strengths, sources, strict=True)],
        options=options.record(),
    )
    plan = replace(plan, record_bytes=recorded)
    return MergePlan(
        base_source,
        sources,
        strengths,
        plan,
        accounts,
        predict_peak(plan, workers or usable_cores()),
    )


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _config(base: Checkpoint) -> ConfigEdits | None:
    if base.config is None or base.single_file:
        return None
    config = ConfigEdits(base.config)
    config.refuse_quantised()
    return config


def _edit_config(config: ConfigEdits | None, accounts: Accounts, options: _Options) -> None:
    if config is None:
        return
    if options.dtype is not None:
        config.set_dtype(cli_name(options.dtype))
    if accounts.untied:
        config.untie()
    for old, new in accounts.resized:
        config.resize_vocabulary(old, new)


def _pth_plan(plan: Plan) -> Plan:
    """The plan of a single file, laid out as torch writes it."""
    (shard,) = plan.shards
    return replace(plan, shards=(PlannedShard.lay_out_pth(shard.name, shard.tensors),))


def _check_target(out: Path, planned: MergePlan, *, is_file: bool) -> None:
    files = (".safetensors", *PTH_SUFFIXES)
    if is_file != (out.suffix in files):
        raise UsageError(
            "a file is merged into a file, a folder into a folder",
            path=out,
            expected=f"a name that ends in {' or '.join(files)}" if is_file else "a folder's name",
        )
    if is_file and len(planned.plan.shards) != 1:
        raise UsageError("a file cannot be split", hint="Leave out --max-shard-size")
    inputs = [planned.base.path, *(source.path for source in planned.adapters)]
    resolved = out.resolve()
    for given in (path.resolve() for path in inputs):
        if resolved == given or resolved in given.parents or given in resolved.parents:
            raise UsageError(
                "the output must not be, hold or lie in an input", path=out, found=str(given)
            )


def _dtype(name: str) -> str | None:
    if name == "keep":
        return None
    if name not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"unknown dtype {name!r}", expected="keep, float32, bfloat16 or float16")
    return by_cli_name(name)


def _size(text: str | None) -> int | None:
    return None if text is None else parse_size(text)
