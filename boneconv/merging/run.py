"""Merging: the plans of one or several outputs, carried out in one pass over the base."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

from boneconv.delta import DeltaJob
from boneconv.digest import file_digest
from boneconv.engine.commit import Run, carry_out_all
from boneconv.engine.device import check_device
from boneconv.engine.plan import Plan, PlannedShard
from boneconv.engine.progress import Progress
from boneconv.engine.stream import ShardDigests
from boneconv.errors import NonFiniteError, UsageError
from boneconv.formats.native import Violation
from boneconv.io.hub import locate
from boneconv.io.pth import PTH_SUFFIXES
from boneconv.io.staging import check_all_free
from boneconv.merging.kept_delta import KeptDelta, check_place
from boneconv.merging.native_rules import numbered
from boneconv.planning.fingerprints import base_mismatches
from boneconv.planning.plan import (
    Components,
    MergePlan,
    Options,
    PathLike,
    plan_located,
    stacks,
    wanted_of,
)
from boneconv.planning.record import RECORD_NAME, encode_record, source_entry

__all__ = ["Check", "MergeResult", "Progress", "merge"]

#: Looks at a complete output in its place of work; raises CheckFailedError to publish nothing.
Check = Callable[[Path], None]


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
        each: The further outputs that were made in the same pass.
    """

    out: Path
    record: Path
    counts: dict[str, int]
    nbytes: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    delta: Path | None = None
    each: tuple[MergeResult, ...] = ()


def merge(
    base: PathLike,
    adapter: PathLike,
    out: PathLike,
    *,
    more: Sequence[PathLike] = (),
    each: Sequence[tuple[PathLike, PathLike]] = (),
    component: str | None = None,
    components: Components | None = None,
    scale: float = 1.0,
    dtype: str = "keep",
    max_shard_size: str | None = None,
    device: str = "cpu",
    workers: int | None = None,
    executor: Executor | None = None,
    card: bool = True,
    allow_base_mismatch: bool = False,
    keep_delta: PathLike | None = None,
    check: Check | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Merges one or more Bone, BAT or mini adapters into a checkpoint.

    Memory is bounded whatever the model's size, and ``out`` appears whole or not at all. The bytes
    are the canonical merge's: every weight is the exact value rounded once (specification, section
    "Numerics"), the same for every device and number of workers.

    A diffusers pipeline is merged into by its components. Their folders are merged as checkpoints
    of their own would be, to the same bytes; all else of the pipeline is copied as it is, other
    components in whatever dtype and form they have. What is left out, and listed, are other copies
    of the merged components' weights, and of the whole pipeline in one file.

    Args:
        base: A folder, a ``.safetensors`` or ``.pth`` file, or a Hub id ``owner/name[@revision]``.
            With ``component``, a pipeline: a folder with a model_index.json, or a Hub id.
        adapter: The same, for the adapter.
        out: A folder for a folder, a file for a file.
        more: Further adapters, applied in order after the first.
        each: Further outputs, as pairs of an adapter and its own output, made in the same pass:
            the base is read from the disk once. All outputs appear when all are complete. Each
            holds its one adapter alone; in a pipeline, merged into ``component``.
        component: The component of a pipeline that ``adapter`` is merged into, such as ``unet``.
        components: Further components, and the adapter of each, or several in order.
        scale: S in ``W + S (W' - W)``, for every adapter.
        dtype: ``keep``, or ``float32``, ``bfloat16``, ``float16`` for every floating tensor;
            in a pipeline, for those of the components that are merged into.
        max_shard_size: Such as ``5GB``: lay the tensors out anew; absent: keep the base's files.
        device: ``cpu``, or a torch device such as ``cuda``.
        workers: Workers that compute; by default one for each usable core.
        executor: Computes in place of workers of this process, a shard at a time. Its workers may
            be on other machines that see the same files, by the same paths.
        card: Whether to write a model card in place of the base's README.md.
        allow_base_mismatch: Whether to go on where a native adapter's fingerprint says that it was
            made for another base; the result's notes then say so.
        keep_delta: A file to keep what `boneconv.unmerge` needs to restore every byte of the base.
        check: Is called with every output when it is complete and not yet published: its folder or
            file in the place of work, named by a suffix as ``out`` is. What it raises publishes
            none of the outputs, and no delta file.
        force: Whether to replace ``out``.
        progress: Is told how far the merge is.

    Raises:
        CheckFailedError: Raised by ``check``; nothing is left behind.
        BaseMismatchError: An adapter's fingerprint is not that of the base; it names the tensors.
        InputError: One of its kinds, for every fault in the input; nothing is left behind.
        MachineError: The disk or the network failed; running again goes on from there.
    """
    wanted = [(stacks(adapter, more, component, components), Path(out))]
    wanted += [(stacks(one, component=component), Path(place)) for one, place in each]
    places = [place for _, place in wanted]
    check_all_free(places if keep_delta is None else [Path(keep_delta), *places], force=force)
    check_device(device)
    options = Options.parse(
        scale=scale, dtype=dtype, max_shard_size=max_shard_size, card=card, workers=workers
    )
    source = locate(base, wanted_of(component))
    outputs = [
        _Output(plan_located(source, adapters, options), place, options, allow_base_mismatch)
        for adapters, place in wanted
    ]
    _check_apart(outputs)
    advance = progress.advance if progress is not None else lambda nbytes: None
    kept = None
    if keep_delta is not None:
        if each:
            raise UsageError("a delta file belongs to one output", hint="Leave out each")
        check_place(Path(keep_delta), outputs[0].out, source.path, force=force)
        kept = KeptDelta(Path(keep_delta), outputs[0].delta_job(), options.workers, force, advance)
    if progress is not None:
        work = sum(output.plan.work_bytes for output in outputs)
        progress.start(work + (kept.work if kept is not None else 0))
    try:
        carry_out_all(
            [output.run(force, check, kept) for output in outputs],
            workers=options.workers,
            device=device,
            executor=executor,
            advance=advance,
        )
    except NonFiniteError as error:
        strengths = tuple(s for output in outputs for s in output.planned.strengths)
        raise numbered(error, strengths) from error
    first, *others = [output.result(kept) for output in outputs]
    return replace(first, each=tuple(others))


class _Output:
    """One output of a merge."""

    def __init__(
        self, planned: MergePlan, out: Path, options: Options, allow_base_mismatch: bool
    ) -> None:
        self.planned, self.out, self._options = planned, out, options
        self._allow_base_mismatch = allow_base_mismatch
        self._strangers: list[Violation] = []
        self.is_file = planned.base.path.is_file()
        _check_target(out, planned, is_file=self.is_file)
        self.plan = _pth_plan(planned.plan) if out.suffix in PTH_SUFFIXES else planned.plan
        self._adapters = planned.adapter_entries(
            [file_digest(strength.adapter.weights) for strength in planned.strengths]
        )
        self._record_name = f"{out.name}.{RECORD_NAME}" if self.is_file else RECORD_NAME

    def run(self, force: bool, check: Check | None, kept: KeptDelta | None) -> Run:
        """What the engine carries out."""

        def before_publish(made: Path, digests: ShardDigests) -> None:
            if check is not None:
                check(made)

        return Run(
            plan=self.plan,
            out=self.out,
            identity=json.dumps([self._adapters, self._options.record()]).encode(),
            record=self._record,
            record_name=self._record_name,
            is_file=self.is_file,
            force=force,
            before_publish=before_publish,
            companion=kept,
        )

    def delta_job(self) -> DeltaJob:
        """What a delta file is made from; raises UsageError where there can be none."""
        if self.planned.is_pipeline:
            raise UsageError(
                "a delta file restores one checkpoint, not components of a pipeline",
                hint="Leave out --keep-delta, and keep the pipeline",
            )
        if self.planned.parts[0].dequantised.weights:
            raise UsageError(
                "a delta file cannot restore quantised weights, which a merge dequantises",
                hint="Leave out --keep-delta, and keep the base",
            )
        return DeltaJob(
            self.planned.parts[0].checkpoint,
            self.plan,
            [strength.adapter for strength in self.planned.strengths],
            [entry["blake3"] for entry in self._adapters],
        )

    def result(self, kept: KeptDelta | None) -> MergeResult:
        """What was done."""
        name = self._record_name
        return MergeResult(
            out=self.out,
            record=self.out.with_name(name) if self.is_file else self.out / name,
            counts=self.planned.counts,
            nbytes=self.plan.total_bytes,
            left_out=tuple(map(str, self.planned.plan.left_out)),
            notes=(*self.planned.notes, *(violation.message for violation in self._strangers)),
            delta=None if kept is None else kept.file,
        )

    def _record(self, digests: ShardDigests) -> bytes:
        """Checks the fingerprints, before anything is published, and makes the record."""
        planned = self.planned
        bases = {name: each.base for name, each in digests.items()}
        self._strangers += base_mismatches(planned, bases)
        if self._strangers and not self._allow_base_mismatch:
            raise self._strangers[0].error()
        return encode_record(
            self.plan,
            digests,
            base=source_entry(planned.base),
            adapters=self._adapters,
            options=self._options.record(),
            fingerprint_ignored=bool(self._strangers),
        )


def _check_apart(outputs: Sequence[_Output]) -> None:
    """Raises UsageError unless every output has a place of its own."""
    places = [output.out.resolve() for output in outputs]
    for number, place in enumerate(places):
        for other in places[:number]:
            if place == other or place in other.parents or other in place.parents:
                raise UsageError(
                    "two outputs in one place", path=outputs[number].out, found=str(other)
                )


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


def _pth_plan(plan: Plan) -> Plan:
    """The plan of a single file, laid out as torch writes it."""
    (shard,) = plan.shards
    return replace(plan, shards=(PlannedShard.lay_out_pth(shard.name, shard.tensors),))
