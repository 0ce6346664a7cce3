"""Shards as independent tasks of any `concurrent.futures.Executor`, on this machine or on others.

The machines share the file system that base, adapter and OUT lie on. A task opens everything by
path and writes the same bytes whenever it is run, so that an executor may run it again after a
worker was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future, as_completed
from pathlib import Path

from boneconv.engine.plan import PlannedShard
from boneconv.engine.stream import Finished, ShardDigests, stream
from boneconv.errors import BoneconvError, MachineError, printable

__all__ = ["stream_on", "write_shard"]


def stream_on(
    executor: Executor,
    shards: Sequence[PlannedShard],
    path_of: Callable[[PlannedShard], Path],
    *,
    device: str = "cpu",
    advance: Callable[[int], None] = lambda nbytes: None,
    finished: Finished,
) -> None:
    """Writes and flushes every shard as a task of an executor; otherwise as `stream`.

    The first error cancels what has not begun, waits for what has, and is raised.

    Raises:
        MachineError: A task failed for another reason than its input.
    """
    tasks: dict[Future[ShardDigests], PlannedShard] = {
        executor.submit(write_shard, shard, path_of(shard).absolute(), device): shard
        for shard in shards
    }
    try:
        for task in as_completed(tasks):
            shard = tasks[task]
            finished(shard, _result(task, shard))
            advance(sum(tensor.nbytes for tensor in shard.tensors))
    finally:
        for task in tasks:
            task.cancel()
        for task in as_completed(tasks):
            task.cancelled() or task.exception()


def write_shard(shard: PlannedShard, path: Path, device: str = "cpu") -> ShardDigests:
    """Writes and flushes one shard, in this process; raises as `stream`."""
    found: ShardDigests = {}
    stream(
        [shard],
        lambda _: path,
        workers=1,
        device=device,
        finished=lambda _, digests: found.update(digests),
    )
    return found


def _result(task: Future[ShardDigests], shard: PlannedShard) -> ShardDigests:
    try:
        return task.result()
    except BoneconvError:
        raise
    except (Exception, CancelledError) as error:
        raise MachineError(
            f"the task for {shard.name} failed: {type(error).__name__}: {printable(str(error))}",
            hint="Run the command again; finished shards are kept",
        ) from error
