"""Workers that each keep to a queue of their own and steal from the others' tails when idle.

Workers are processes where the system can fork: numpy lets go of the interpreter's lock so often
that two threads are no faster than one. Where it cannot, or where other threads make a fork unsafe,
workers are threads. Tasks are numbered, so that nothing but their results travels.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, MutableSequence, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

from boneconv.errors import MachineError
from boneconv.io.files import machine_errors

__all__ = ["Board", "Place", "can_fork", "run_queues", "usable_cores"]

Result = TypeVar("Result")

#: A task: the number of its queue, and its number in it.
Place = tuple[int, int]

#: Does tasks one after the other; what it holds open is closed when its context ends.
MakeWorker = Callable[[], AbstractContextManager[Callable[[Place], Result]]]

_PATIENCE = 10.0  # seconds for a stopped worker to finish the task it is at


def can_fork() -> bool:
    """Whether workers can be processes: not on Windows and macOS, nor beside other threads."""
    return sys.platform == "linux" and threading.active_count() == 1


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_queues(
    lengths: Sequence[int],
    make_worker: MakeWorker[Result],
    on_done: Callable[[Place, Result], None],
    workers: int,
    *,
    processes: bool,
) -> None:
    """Does every task of every queue.

    The first error stops all workers after the task they are at, and is raised.

    Args:
        lengths: How many tasks each queue has.
        make_worker: Called in each worker.
        on_done: Is told each task's result, here, in this thread.
        workers: How many work at the same time.
        processes: Whether they are processes; their results are pickled.

    Raises:
        MachineError: A worker process was killed.
    """
    if workers <= 1:
        _run_here(lengths, make_worker, on_done)
    elif processes:
        _run_processes(lengths, make_worker, on_done, workers)
    else:
        _run_threads(lengths, make_worker, on_done, workers)


class _Lock(Protocol):
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> Any: ...


class Board:
    """Which tasks are taken: the head and the tail of every queue, in memory that workers share.

    Args:
        lengths: How many tasks each queue has.
        shared: Makes a mutable sequence of integers that all workers see.
        lock: Excludes them from each other.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        shared: Callable[[list[int]], MutableSequence[int]],
        lock: _Lock,
    ) -> None:
        self._heads = shared([0] * len(lengths))
        self._tails = shared(list(lengths))
        self._fresh = shared([0, 0])  # the first queue that nobody has begun; whether to stop
        self._lock = lock

    def take(self, mine: int | None) -> Place | None:
        """The next task for a worker that keeps to the queue ``mine``; None when all are taken."""
        with self._lock:
            if self._fresh[1]:
                return None
            if mine is not None and self._left(mine):
                return self._from_head(mine)
            while self._fresh[0] < len(self._heads):
                mine = self._fresh[0]
                self._fresh[0] += 1
                if self._left(mine):
                    return self._from_head(mine)
            longest = max(range(len(self._heads)), key=self._left, default=None)
            if longest is None or not self._left(longest):
                return None
            self._tails[longest] -= 1
            return longest, self._tails[longest]

    def stop(self) -> None:
        """Nobody gets another task."""
        self._fresh[1] = 1

    def _left(self, queue_number: int) -> int:
        return self._tails[queue_number] - self._heads[queue_number]

    def _from_head(self, queue_number: int) -> Place:
        self._heads[queue_number] += 1
        return queue_number, self._heads[queue_number] - 1


def _work(
    board: Board,
    make_worker: MakeWorker[Result],
    send: Callable[[tuple[Place, Result]], object],
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """One worker's life."""
    with make_worker() as do:
        place = board.take(None)
        mine = place[0] if place else None
        while place is not None and wanted():
            send((place, do(place)))
            place = board.take(mine)
            if place is not None and place[1] == 0:
                mine = place[0]


def _run_here(
    lengths: Sequence[int],
    make_worker: MakeWorker[Result],
    on_done: Callable[[Place, Result], None],
) -> None:
    board = Board(lengths, list, contextlib.nullcontext())
    _work(board, make_worker, lambda message: on_done(*message))


def _run_threads(
    lengths: Sequence[int],
    make_worker: MakeWorker[Result],
    on_done: Callable[[Place, Result], None],
    workers: int,
) -> None:
    board = Board(lengths, list, threading.Lock())
    results: queue.SimpleQueue[tuple[Place, Result] | BaseException | None] = queue.SimpleQueue()

    def live() -> None:
        try:
            _work(board, make_worker, results.put)
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            results.put(error)
        results.put(None)

    threads = [threading.Thread(target=live, name="boneconv") for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        alive = workers
        while alive:
            message = results.get()
            if isinstance(message, BaseException):
                raise message
            if message is None:
                alive -= 1
            else:
                on_done(*message)
    finally:
        board.stop()
        for thread in threads:
            thread.join()


def _run_processes(
    lengths: Sequence[int],
    make_worker: MakeWorker[Result],
    on_done: Callable[[Place, Result], None],
    workers: int,
) -> None:
    """This process is one of the workers, and hears of the others between its own tasks."""
    fork = multiprocessing.get_context("fork")
    with machine_errors(Path(tempfile.gettempdir())):  # where memory to be shared is kept
        board = Board(lengths, lambda numbers: fork.RawArray("q", numbers), fork.Lock())
    others: dict[Connection, Any] = {}
    gc.freeze()  # a collection in a worker would copy every page that it shares with this process
    try:
        for _ in range(workers - 1):
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=_live, args=(board, make_worker, sender, os.getpid()))
            process.start()
            sender.close()
            others[receiver] = process
        alive = dict(others)

        def done_here(message: tuple[Place, Result]) -> None:
            on_done(*message)
            _collect(alive, on_done, 0)

        _work(board, make_worker, done_here)
        while alive:
            _collect(alive, on_done, None)
    finally:
        board.stop()
        for receiver, process in others.items():
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
            receiver.close()
        gc.unfreeze()


def _live(board: Board, make_worker: MakeWorker[Result], sender: Connection, parent: int) -> None:
    """A worker process; it ends when its parent does, and leaves interrupts to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _work(board, make_worker, sender.send, lambda: os.getppid() == parent)
    except BrokenPipeError:
        return
    except BaseException as error:  # noqa: BLE001 - raised again in the parent
        sender.send(error)


def _collect(
    alive: dict[Connection, Any],
    on_done: Callable[[Place, Result], None],
    patience: float | None,
) -> None:
    """Takes what has come from the other workers, and forgets those that have ended."""
    for ready in wait(list(alive), patience):
        assert isinstance(ready, Connection)
        try:
            message = ready.recv()
        except EOFError:
            _check_exit(alive.pop(ready))
            continue
        if isinstance(message, BaseException):
            raise message
        on_done(*message)


def _check_exit(process: Any) -> None:
    process.join()
    if process.exitcode:
        raise MachineError(
            "a worker process was killed",
            found=f"exit code {process.exitcode}",
            hint="Was memory short? Run it again, with fewer --workers",
        )
