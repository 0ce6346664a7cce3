"""Writing shards with several workers, in memory that does not depend on the model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from boneconv.digest import tensor_digest
from boneconv.engine.compute import Leaves, larger
from boneconv.engine.plan import Action, PlannedShard, PlannedTensor
from boneconv.engine.segments import Segment, segments_of
from boneconv.engine.station import Station, Task
from boneconv.engine.workers import Place, can_fork, run_queues
from boneconv.io.files import Writer, sync_file

__all__ = ["ShardDigests", "TensorDigests", "stream"]


@dataclass(frozen=True)
class TensorDigests:
    """Digests of a written tensor.

    Attributes:
        output: Of what was written.
        base: Of the tensor that it was computed from, where it was merged.
        measures: What its kernel measured, the largest of each.
    """

    output: str
    base: str | None = None
    measures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "measures", tuple(self.measures))  # a list, from a journal


#: Digests by tensor: those of a shard by the names in it, those of an output by
#: `PlannedShard.output_name`.
ShardDigests = dict[str, TensorDigests]
Finished = Callable[[PlannedShard, ShardDigests], None]


def stream(
    shards: Sequence[PlannedShard],
    path_of: Callable[[PlannedShard], Path],
    *,
    workers: int,
    device: str = "cpu",
    advance: Callable[[int], None] = lambda nbytes: None,
    finished: Finished,
) -> None:
    """Writes and flushes every shard.

    Shards of one name, made from one base with several adapters, are written side by side, so that
    the base's file is read from the disk once.

    Args:
        shards: What to write.
        path_of: Where a shard goes; its folder exists.
        workers: How many workers compute.
        device: ``cpu``, or a torch device.
        advance: Is told how many bytes were written.
        finished: Is told, from one thread at a time, that a shard is complete and flushed.

    Raises:
        NonFiniteError: A merged or replaced tensor would hold NaN or infinity.
        FormatError, MachineError: Reading or writing failed.
    """
    jobs = [_Job(shard, path_of(shard)) for shard in shards]
    queues, paths = _queues(jobs), [job.path for job in jobs]

    with ThreadPoolExecutor(1, thread_name_prefix="boneconv-flush") as flusher:

        def on_done(place: Place, leaves: Leaves) -> None:
            number, segment = queues[place[0]][place[1]]
            job = jobs[number]
            if job.is_complete_with(segment, leaves):
                job.start_flush(flusher, finished)
            advance(segment.nbytes)

        run_queues(
            [len(queue) for queue in queues],
            lambda: Station(queues, paths, device),
            on_done,
            workers,
            processes=device == "cpu" and can_fork(),
        )
        for job in jobs:
            job.wait(flusher, finished)


def _queues(jobs: Sequence[_Job]) -> list[list[Task]]:
    """A queue for each name of a shard; of several shards the segments take turns."""
    by_name: dict[str, list[list[Task]]] = {}
    for number, job in enumerate(jobs):
        by_name.setdefault(job.name, []).append([(number, segment) for segment in job.segments])
    return [
        [task for turn in zip_longest(*queues) for task in turn if task is not None]
        for queues in by_name.values()
    ]


class _Job:
    """One shard being written: its file, and the digests of the segments that are done."""

    def __init__(self, shard: PlannedShard, path: Path) -> None:
        self.segments: list[Segment] = list(segments_of(shard))
        self.name = shard.name
        self.path = path
        self._shard = shard
        self._leaves: dict[tuple[str, int], Leaves] = {}
        self._flushed: Future[None] | None = None
        with Writer(path, shard.size) as writer:
            writer.write_at(shard.head, 0)

    def is_complete_with(self, segment: Segment, leaves: Leaves) -> bool:
        """Notes a segment that is done; whether it was the last one."""
        self._leaves[segment.tensor.name, segment.first_row] = leaves
        return len(self._leaves) == len(self.segments)

    def start_flush(self, flusher: ThreadPoolExecutor, finished: Finished) -> None:
        """Flushes the file while other shards are being computed."""
        self._flushed = flusher.submit(self._flush, finished)

    def wait(self, flusher: ThreadPoolExecutor, finished: Finished) -> None:
        """Waits until the file is flushed; one without any segments starts here."""
        if self._flushed is None:
            self.start_flush(flusher, finished)
        assert self._flushed is not None
        self._flushed.result()

    def _flush(self, finished: Finished) -> None:
        if self._shard.seal is not None:
            self._shard.seal(self.path)
        sync_file(self.path)
        finished(self._shard, self._digests())

    def _digests(self) -> ShardDigests:
        parts: dict[str, list[Leaves]] = {tensor.name: [] for tensor in self._shard.tensors}
        for (name, _), leaves in sorted(self._leaves.items()):
            parts[name].append(leaves)
        return {tensor.name: _digests(tensor, parts[tensor.name]) for tensor in self._shard.tensors}


def _digests(tensor: PlannedTensor, parts: Sequence[Leaves]) -> TensorDigests:
    output = [leaf for part in parts for leaf in part.output]
    base = [leaf for part in parts for leaf in part.source]
    merged = tensor.action is Action.MERGE
    return TensorDigests(
        tensor_digest(tensor.dtype, tensor.shape, output),
        tensor_digest(tensor.source.dtype, tensor.shape, base) if merged else None,
        _largest(part.measures for part in parts),
    )


def _largest(found: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    result: tuple[float, ...] = ()
    for measures in found:
        result = larger(result, measures)
    return result
