"""Carrying out a plan: resume, stream, copy, record, publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import blake3

from boneconv.digest import stored_digest
from boneconv.engine.plan import Plan, PlannedShard
from boneconv.engine.remote import stream_on
from boneconv.engine.stream import ShardDigests, TensorDigests, stream
from boneconv.errors import BoneconvError, OutputExistsError
from boneconv.io.copying import copy_file
from boneconv.io.files import Reader, machine_errors, sync_file
from boneconv.io.safetensors import read_header
from boneconv.io.staging import (
    Staging,
    check_all_free,
    check_free,
    nearest_folder,
    require_space,
)

__all__ = ["Run", "carry_out", "carry_out_all"]

Record = Callable[[ShardDigests], bytes]
BeforePublish = Callable[[Path, ShardDigests], None]


class Companion(Protocol):
    """A file of its own that is published right before an output."""

    def open(self, key: str) -> Staging:
        """Opens its place of work, before anything is written; the key is that of the run."""

    def write(self, staging: Staging, made: Path, digests: ShardDigests) -> None:
        """Writes it; is given the complete output in its place of work, and the digests."""


@dataclass(frozen=True)
class Run:
    """One output.

    Attributes:
        plan: What to write.
        out: A folder, or a file where the plan is one shard.
        identity: What else determines the output (adapters, options): a run goes on from another's
            journal only where it is equal.
        record: Makes the record's bytes from the digests of all tensors; may raise to publish
            nothing.
        record_name: The record's name, inside the folder or beside the file.
        is_file: Whether ``out`` is a file.
        force: Whether to replace an existing ``out``.
        before_publish: Is given the complete output in its place of work, and the digests; may
            raise to publish nothing.
        companion: A file of its own that is published with the output.
    """

    plan: Plan
    out: Path
    identity: bytes
    record: Record
    record_name: str
    is_file: bool = False
    force: bool = False
    before_publish: BeforePublish | None = None
    companion: Companion | None = None

    @property
    def beside(self) -> Path | None:
        """Where the record of a file goes."""
        return self.out.with_name(self.record_name) if self.is_file else None


def carry_out(
    plan: Plan,
    out: Path,
    *,
    identity: bytes,
    record: Record,
    record_name: str,
    is_file: bool,
    force: bool,
    workers: int,
    device: str = "cpu",
    executor: Executor | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
    before_publish: BeforePublish | None = None,
) -> ShardDigests:
    """Writes one output; arguments as of `Run` and `carry_out_all`."""
    run = Run(plan, out, identity, record, record_name, is_file, force, before_publish)
    return carry_out_all([run], workers=workers, device=device, executor=executor, advance=advance)[
        0
    ]


def carry_out_all(
    runs: Sequence[Run],
    *,
    workers: int,
    device: str = "cpu",
    executor: Executor | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> list[ShardDigests]:
    """Writes all that the plans hold, and publishes each output when all are complete.

    What an earlier, killed run had published of them is not written again. If an output cannot be
    published, those before it are withdrawn.

    Args:
        runs: The outputs.
        workers: How many workers compute.
        device: ``cpu``, or a torch device.
        executor: Does the shards, instead of workers of this process.
        advance: Is told how many bytes were written, `Plan.work_bytes` in all.

    Returns:
        The digests of every tensor, for each output, by `PlannedShard.output_name`.

    Raises:
        OutputExistsError, LockedError, DiskFullError, MachineError: An output cannot be written.
        NonFiniteError, FormatError: The input is bad; nothing is left behind.
    """
    check_all_free([run.out for run in runs], force=all(run.force for run in runs))
    for run in runs:
        check_free(run.out, force=run.force, beside=run.beside)
    for out, nbytes in _needed(runs):
        require_space(out, nbytes)
    with ExitStack() as stack:
        outputs = [_Output(run, stack) for run in runs]
        owners = {id(shard): output for output in outputs for shard in output.missing}
        shards = [shard for output in outputs for shard in output.missing]
        advance(sum(output.done_bytes for output in outputs))

        def path_of(shard: PlannedShard) -> Path:
            return owners[id(shard)].path_of(shard)

        def finished(shard: PlannedShard, digests: ShardDigests) -> None:
            owners[id(shard)].finished(shard, digests)

        if executor is None:
            stream(
                shards,
                path_of,
                workers=workers,
                device=device,
                advance=advance,
                finished=finished,
            )
        else:
            stream_on(executor, shards, path_of, device=device, advance=advance, finished=finished)
        work = [place for output in outputs for place in output.complete(advance)]
        _publish_all(work)
    return [output.digests for output in outputs]


def _publish_all(work: Sequence[Staging]) -> None:
    begun: list[Staging] = []
    try:
        for staging in work:
            if not staging.published:
                begun.append(staging)
                staging.publish()
    except BaseException:
        for staging in reversed(begun):
            staging.withdraw()
        raise


class _Output:
    """An output being written."""

    def __init__(self, run: Run, stack: ExitStack) -> None:
        self._run = run
        key = _key(run.plan, run.identity)
        self._companion: Staging | None = None
        if run.companion is not None:
            self._companion = stack.enter_context(run.companion.open(key))
        self.staging = stack.enter_context(
            Staging(
                run.out,
                key=key,
                is_file=run.is_file,
                force=run.force,
                beside=run.beside,
            )
        )
        self._place = run.out if self.staging.published else self.staging.target
        self.digests: ShardDigests = {}
        self.missing: list[PlannedShard] = []
        self.done_bytes = 0
        for shard in run.plan.shards:
            found = self._digests_on_disk(shard)
            if found is None:
                self.missing.append(shard)
            else:
                self._note(shard, found)
                self.done_bytes += sum(tensor.nbytes for tensor in shard.tensors)
        if self.staging.published and self.missing:
            raise OutputExistsError(
                "the output exists already, and has changed since it was written",
                path=run.out,
                hint="Choose another place, or move it away",
            )

    def path_of(self, shard: PlannedShard) -> Path:
        """Where a shard is written; makes its folder."""
        if self._run.is_file:
            return self._place
        path = self._place / shard.name
        with machine_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finished(self, shard: PlannedShard, found: ShardDigests) -> None:
        """Notes that a shard is complete and flushed."""
        self._note(shard, found)
        self.staging.record(shard.name, {"tensors": {k: asdict(v) for k, v in found.items()}})

    def complete(self, advance: Callable[[int], None]) -> list[Staging]:
        """Writes all but the shards; what is to be published, in this order."""
        content = self._run.record(self.digests)
        if self.staging.published:
            advance(self._run.plan.copied_bytes)
        elif self._run.is_file:
            _write_file(self.staging.beside, content)
        else:
            _write_folder(self._run.plan, self.staging.target, advance)
            _write_file(self.staging.target / self._run.record_name, content)
        if self._run.before_publish is not None:
            self._run.before_publish(self._place, self.digests)
        if self._run.companion is None or self._companion is None:
            return [self.staging]
        if not self._companion.published:
            self._run.companion.write(self._companion, self._place, self.digests)
        return [self._companion, self.staging]

    def _note(self, shard: PlannedShard, found: ShardDigests) -> None:
        self.digests.update({shard.output_name(name): each for name, each in found.items()})

    def _digests_on_disk(self, shard: PlannedShard) -> ShardDigests | None:
        """The digests of a shard that an earlier run completed and nobody touched since."""
        found = _parse_entry(self.staging.finished.get(shard.name, {}))
        if found is not None and _is_intact(self.path_of(shard), shard, found):
            return found
        return None


def _needed(runs: Sequence[Run]) -> list[tuple[Path, int]]:
    """For each disk that is written to, an output on it, and the bytes of all outputs there."""
    needed: dict[int, tuple[Path, int]] = {}
    for run in runs:
        device = nearest_folder(run.out).stat().st_dev
        out, nbytes = needed.get(device, (run.out, 0))
        needed[device] = (out, nbytes + run.plan.total_bytes)
    return list(needed.values())


def _key(plan: Plan, identity: bytes) -> str:
    """A digest of all that determines the weight files: a journal of another plan is useless."""
    hasher = blake3.blake3(identity)
    for shard in plan.shards:
        actions = [(tensor.name, tensor.action) for tensor in shard.tensors]
        hasher.update(repr((shard.name, shard.head, actions)).encode())
    for path in plan.sources():
        stat = path.stat()
        hasher.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return hasher.hexdigest()


def _parse_entry(entry: Mapping[str, Any]) -> ShardDigests | None:
    """The digests in a line of the journal; None where there are none."""
    try:
        return {name: TensorDigests(**value) for name, value in entry["tensors"].items()}
    except (KeyError, TypeError, AttributeError):
        return None


def _is_intact(path: Path, shard: PlannedShard, digests: ShardDigests) -> bool:
    """Whether a file has the planned header and tensors of these digests."""
    try:
        tensors = read_header(path).tensors
        head = bytearray(len(shard.head))
        with Reader(path) as reader:
            reader.read_into(memoryview(head), 0)
            return head == shard.head and all(
                stored_digest(stored, reader) == digests[name].output
                for name, stored in tensors.items()
            )
    except (BoneconvError, KeyError):
        return False


def _write_folder(plan: Plan, target: Path, advance: Callable[[int], None]) -> None:
    for name, source in plan.copies.items():
        copy_file(source, target / name)
        sync_file(target / name)
        advance((target / name).stat().st_size)
    for name, content in plan.texts.items():
        _write_file(target / name, content)


def _write_file(path: Path, content: bytes) -> None:
    with machine_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        sync_file(path)
