"""Shards as tasks of an executor: the same bytes as workers of our own, whoever runs them."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boneconv.engine.commit import carry_out
from boneconv.engine.plan import Plan
from boneconv.engine.stream import ShardDigests
from boneconv.errors import MachineError, NonFiniteError
from boneconv.planning import plan_merge
from tests.builders import blocks_for_all, make_adapter, make_base, snapshot


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("inputs")
    base = make_base(folder / "base", shards=3)
    return plan_merge(base, make_adapter(folder / "adapter")).plan


@pytest.fixture(params=["threads", "processes"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    spawn = multiprocessing.get_context("spawn")
    make: dict[str, Callable[[], Executor]] = {
        "threads": lambda: ThreadPoolExecutor(2),
        "processes": lambda: ProcessPoolExecutor(2, mp_context=spawn),
    }
    with make[request.param]() as pool:
        yield pool


def _record(digests: ShardDigests) -> bytes:
    return json.dumps({name: each.output for name, each in sorted(digests.items())}).encode()


def _run(plan: Plan, out: Path, executor: Executor | None, **more: Any) -> ShardDigests:
    return carry_out(
        plan,
        out,
        identity=b"same",
        record=_record,
        record_name="record.json",
        is_file=False,
        force=False,
        workers=1,
        executor=executor,
        **more,
    )


def test_an_executor_writes_the_same_bytes(plan: Plan, tmp_path: Path, executor: Executor) -> None:
    told: list[int] = []
    expected = _run(plan, tmp_path / "here", None)
    assert _run(plan, tmp_path / "there", executor, advance=told.append) == expected
    assert snapshot(tmp_path / "there") == snapshot(tmp_path / "here")
    assert sum(told) == plan.work_bytes


def test_a_bad_input_is_the_same_error(tmp_path: Path, executor: Executor) -> None:
    base = make_base(tmp_path / "base", shards=3)
    blocks = blocks_for_all("bone")
    next(iter(blocks.values()))[0, 0] = np.nan
    adapter = make_adapter(tmp_path / "adapter", blocks=blocks)
    with pytest.raises(NonFiniteError, match="adapter_model"):
        _run(plan_merge(base, adapter).plan, tmp_path / "out", executor)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


class _Losing(ThreadPoolExecutor):
    """Loses its first task once, as a cluster does that gives up on it."""

    lost = False

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if not self.lost:
            self.lost = True
            return super().submit(_die)
        return super().submit(fn, *args, **kwargs)


def _die() -> None:
    raise RuntimeError("worker \x1b[31mlost")


def test_what_a_lost_task_left_undone_is_done_by_the_next_run(plan: Plan, tmp_path: Path) -> None:
    expected = _run(plan, tmp_path / "here", None)
    with _Losing(2) as pool:
        with pytest.raises(MachineError, match=r"task for .* failed: RuntimeError") as caught:
            _run(plan, tmp_path / "out", pool)
        assert "\x1b" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        assert _run(plan, tmp_path / "out", pool) == expected
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "here")
