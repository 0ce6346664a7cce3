"""Getting the base back from a merged checkpoint.

Bone and mini are subtracted, BAT is undone by the inverse of I + S B, block by block
(`boneconv.kernels.inverse`). Without a delta file the result is as near to the base as the rounding
of the merge allows, and a bound on the difference is computed. With the delta file that the merge
wrote (`boneconv.delta`), every tensor and file is the base's, byte for byte, and nothing is
published whose digests are not those of the base.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from boneconv.delta import DeltaFile, open_delta
from boneconv.digest import file_digest
from boneconv.engine.commit import carry_out
from boneconv.engine.plan import Action, Plan
from boneconv.engine.progress import Progress
from boneconv.engine.workers import usable_cores
from boneconv.errors import UsageError
from boneconv.io.checkpoint import Checkpoint, open_checkpoint
from boneconv.io.hub import ADAPTER, BASE, locate
from boneconv.io.staging import check_free
from boneconv.unmerging.matching import Merged, find_updates, read_adapters
from boneconv.unmerging.outcome import Outcome
from boneconv.unmerging.planning import is_merge_card, plan_with, plan_without
from boneconv.unmerging.records import RECORD_NAME, MergeRecord, RestoredTensor, read_record

__all__ = ["Progress", "RestoredTensor", "UnmergeResult", "unmerge"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class UnmergeResult:
    """What an unmerge did.

    Attributes:
        out: The restored base.
        record: Its record, a JSON file.
        restored: The tensors that were computed, each with a bound on what it differs by.
        counts: How many tensors were restored, copied from the merged checkpoint, and taken from
            the delta file.
        exact: Whether every tensor is the base's, by its digest; None where that is not known.
        nbytes: Bytes written.
        left_out: Files of the base that are not restored.
        notes: What the user should know.
    """

    out: Path
    record: Path
    restored: tuple[RestoredTensor, ...]
    counts: dict[str, int]
    exact: bool | None
    nbytes: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def worst_bound(self) -> float:
        """The largest bound of any tensor."""
        return max((each.bound for each in self.restored), default=0.0)

    @property
    def worst_condition(self) -> float:
        """The largest condition number of any block that was inverted."""
        return max((each.condition or 1.0 for each in self.restored), default=1.0)


def unmerge(
    merged: PathLike,
    adapter: PathLike,
    out: PathLike,
    *,
    more: Sequence[PathLike] = (),
    delta: PathLike | None = None,
    scale: float | None = None,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> UnmergeResult:
    """Restores the base of a merged checkpoint.

    Without ``delta``, each restored element x satisfies ``|x - w| <= bound`` for the base's w. The
    bound has three parts: half a unit in the last place of the merged weight, carried through the
    inverse of I + S B for BAT (times the norm of its absolute column sums); the error of the
    computed inverse; and the rounding of x itself. It holds for merges of boneconv, and of any tool
    that rounds the exact value once. With ``delta``, x = w.

    Args:
        merged: A folder or file that `boneconv.merge` wrote, or a Hub id.
        adapter: The adapter that was merged.
        out: A folder for a folder, a file for a file.
        more: Further adapters that were merged, in the order of the merge.
        delta: The file that the merge kept with ``keep_delta``.
        scale: The scale of the merge, where there is no record of it; 1 by default.
        workers: How many workers compute; by default one for each usable core.
        force: Whether to replace ``out``.
        progress: Is told how far it is.

    Raises:
        InputError: One of its kinds: another adapter, a singular block, tensors that cannot be
            restored without the delta file, or a checkpoint that has changed since the merge.
            Nothing is left behind.
        MachineError: The disk or the network failed; running again goes on from there.
    """
    target = Path(out)
    sources = [locate(given, ADAPTER).path for given in (adapter, *more)]
    source = locate(merged, BASE).path
    is_file = source.is_file()
    record_path = _record_path(target, is_file=is_file)
    check_free(target, force=force, beside=record_path if is_file else None)
    _check_target(target, [source, *sources], is_file=is_file)
    record = read_record(source)
    checkpoint = open_checkpoint(source)
    adapters = read_adapters(sources, record, scale)
    known = None if delta is None else open_delta(Path(delta))
    plan = _plan(checkpoint, record, adapters, known)
    delta_digest = None if known is None else file_digest(known.path)
    outcome = Outcome(source, record, adapters, known, delta_digest, plan)
    if progress is not None:
        progress.start(plan.work_bytes)
    digests = carry_out(
        plan,
        target,
        identity=outcome.identity(),
        record=outcome.record_bytes,
        record_name=record_path.name,
        is_file=is_file,
        force=force,
        workers=workers or usable_cores(),
        advance=progress.advance if progress is not None else lambda nbytes: None,
    )
    restored = outcome.restored(digests)
    exact = {each.exact for each in restored}
    return UnmergeResult(
        out=target,
        record=record_path,
        restored=restored,
        counts=_counts(plan, known),
        exact=False if False in exact else None if None in exact else True,
        nbytes=plan.total_bytes,
        left_out=tuple(map(str, plan.left_out)),
        notes=_notes(checkpoint, record, adapters, known),
    )


def _plan(
    checkpoint: Checkpoint,
    record: MergeRecord | None,
    adapters: Sequence[Merged],
    delta: DeltaFile | None,
) -> Plan:
    if delta is not None:
        return plan_with(checkpoint, record, delta, adapters)
    return plan_without(checkpoint, find_updates(checkpoint, record, adapters))


def _record_path(out: Path, *, is_file: bool) -> Path:
    return out.with_name(f"{out.name}.{RECORD_NAME}") if is_file else out / RECORD_NAME


def _check_target(out: Path, inputs: Sequence[Path], *, is_file: bool) -> None:
    suffix = inputs[0].suffix if is_file else ""
    if is_file and out.suffix != suffix:
        raise UsageError(
            "a file is unmerged into a file of its kind",
            path=out,
            expected=f"a name that ends in {suffix}",
        )
    resolved = out.resolve()
    for given in (path.resolve() for path in inputs):
        if resolved == given or resolved in given.parents or given in resolved.parents:
            raise UsageError(
                "the output must not be, hold or lie in an input", path=out, found=str(given)
            )


def _counts(plan: Plan, delta: DeltaFile | None) -> dict[str, int]:
    stored = 0
    if delta is not None:
        stored = sum(each.how == "stored" for each in delta.document.tensors.values())
    copied = len(plan.by_action(Action.COPY)) - stored
    return {"restored": len(plan.by_action(Action.MERGE)), "copied": copied, "stored": stored}


def _notes(
    checkpoint: Checkpoint,
    record: MergeRecord | None,
    adapters: Sequence[Merged],
    delta: DeltaFile | None,
) -> tuple[str, ...]:
    notes = []
    if record is None and delta is None:
        notes.append(
            f"no {RECORD_NAME}: that these adapters were merged, with a scale of "
            f"{adapters[0].scale:g} and one rounding, is taken on trust"
        )
    if delta is None:
        cards = [str(name) for name in checkpoint.side_files if is_merge_card(checkpoint, name)]
        notes += [f"{name} is left out: the merge wrote it" for name in cards]
        if any(each.adapter.side_files for each in adapters):
            notes.append("tokenizer files may be the adapter's: the merge prefers them")
    return tuple(notes)
