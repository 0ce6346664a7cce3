"""Workers: every task once, whoever does it; the first error stops all and is raised."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boneconv.engine.workers import Board, Place, can_fork, run_queues
from boneconv.errors import FormatError, MachineError, NonFiniteError

WAYS = [(1, False), (2, False), (4, False), (1, True), (2, True), (3, True)]
way = pytest.mark.parametrize(
    ("workers", "processes"), WAYS, ids=[f"{n}{'p' if p else 't'}" for n, p in WAYS]
)


def _make(do: Callable[[Place], Any]) -> Callable[[], Any]:
    @contextmanager
    def worker() -> Iterator[Callable[[Place], Any]]:
        yield do

    return worker


def _run(lengths: list[int], do: Callable[[Place], Any], workers: int, processes: bool) -> Any:
    results: list[tuple[Place, Any]] = []
    run_queues(
        lengths,
        _make(do),
        lambda place, result: results.append((place, result)),
        workers,
        processes=processes,
    )
    return results


@way
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 3], [5], [1, 7, 0, 2], [40, 1]], ids=str)
def test_every_task_is_done_once(workers: int, processes: bool, lengths: list[int]) -> None:
    found = _run(lengths, lambda place: place[0] * 1000 + place[1], workers, processes)
    places = [(queue, task) for queue, length in enumerate(lengths) for task in range(length)]
    assert sorted(found) == [((q, t), q * 1000 + t) for q, t in places]


@way
def test_results_are_told_in_the_calling_thread(workers: int, processes: bool) -> None:
    told: set[int] = set()
    run_queues(
        [8, 8],
        _make(lambda place: None),
        lambda place, result: told.add(threading.get_ident()),
        workers,
        processes=processes,
    )
    assert told == {threading.get_ident()}


@way
def test_the_first_error_is_raised_with_all_it_says(workers: int, processes: bool) -> None:
    def do(place: Place) -> None:
        if place == (1, 2):
            raise NonFiniteError("bad", path="file", expected="e", found="f", hint="h")

    with pytest.raises(NonFiniteError) as caught:
        _run([6, 6], do, workers, processes)
    error = caught.value
    assert (error.message, error.path, error.expected, error.found, error.hint) == (
        ("bad", "file", "e", "f", "h")
    )
    assert str(error) == "file: bad; expected e, found f. h"


@pytest.mark.parametrize("processes", [False, True])
def test_an_error_stops_the_other_workers(processes: bool) -> None:
    done: list[Place] = []

    def do(place: Place) -> Place:
        if place[0] == 0:
            raise FormatError("stop")
        time.sleep(0.01)
        return place

    with pytest.raises(FormatError):
        run_queues([1, 300], _make(do), lambda p, r: done.append(p), 2, processes=processes)
    assert len(done) < 300


@way
def test_an_error_of_whoever_listens_is_raised(workers: int, processes: bool) -> None:
    def listen(place: Place, result: None) -> None:
        raise MachineError("full")

    with pytest.raises(MachineError, match="full"):
        run_queues([9], _make(lambda place: None), listen, workers, processes=processes)


@way
def test_what_a_worker_holds_is_closed(workers: int, processes: bool, tmp_path: Any) -> None:
    @contextmanager
    def worker() -> Iterator[Callable[[Place], None]]:
        mark = tmp_path / f"{os.getpid()}-{threading.get_ident()}"
        mark.touch()
        try:
            yield lambda place: None
        finally:
            mark.unlink()

    run_queues([20], worker, lambda place, result: None, workers, processes=processes)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_worker_process_is_an_error_of_the_machine() -> None:
    parent = os.getpid()

    def do(place: Place) -> None:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)

    with pytest.raises(MachineError, match="a worker process was killed") as caught:
        _run([8, 8], do, 2, processes=True)
    assert caught.value.exit_code == 3


def test_processes_are_processes_and_none_stays() -> None:
    found = _run([20, 20], lambda place: (time.sleep(0.01), os.getpid())[1], 3, processes=True)
    pids = {pid for _, pid in found}
    assert os.getpid() in pids
    assert len(pids) == 3
    for pid in pids - {os.getpid()}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_are_not_forked_beside_threads() -> None:
    before = can_fork()
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        assert not can_fork()
    finally:
        release.set()
        thread.join()
    assert can_fork() is before


class _NoLock:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


@given(
    lengths=st.lists(st.integers(0, 6), max_size=5),
    turns=st.lists(st.integers(0, 3), max_size=60),
)
@settings(max_examples=200)
def test_a_board_gives_every_task_to_one_worker(lengths: list[int], turns: list[int]) -> None:
    board = Board(lengths, list, _NoLock())
    mine: dict[int, int | None] = dict.fromkeys(range(4))
    taken: Counter[Place] = Counter()
    for worker in [*turns, *(w for w in range(4) for _ in range(sum(lengths) + 1))]:
        place = board.take(mine[worker])
        if place is not None:
            taken[place] += 1
            if mine[worker] is None or place[1] == 0:
                mine[worker] = place[0]
    assert taken == Counter((q, t) for q, length in enumerate(lengths) for t in range(length))


def test_a_worker_keeps_to_its_queue_and_then_takes_from_the_longest_tail() -> None:
    board = Board([3, 5], list, _NoLock())
    assert [board.take(None), board.take(0)] == [(0, 0), (0, 1)]
    assert board.take(None) == (1, 0)
    assert board.take(0) == (0, 2)
    assert board.take(0) == (1, 4)
    board.stop()
    assert board.take(1) is None
