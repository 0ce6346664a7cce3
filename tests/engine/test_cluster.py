"""A merge on a real Dask scheduler with worker processes, on loopback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from boneconv.cli import run
from boneconv.engine.cluster import cluster
from boneconv.errors import NetworkError
from boneconv.merging import merge
from tests.builders import BF16, block_for, grid, make_adapter, make_base, snapshot

SHARDS = 6
SHAPE = (2048, 1024)
ENVIRONMENT = os.environ | {"DASK_DISTRIBUTED__WORKER__DAEMON": "False"}


@dataclass
class Cluster:
    """A scheduler and its workers."""

    address: str
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add_worker(self) -> None:
        command = [sys.executable, "-m", "distributed.cli.dask_worker", self.address]
        command += ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1"]
        quiet = subprocess.DEVNULL
        self.workers.append(subprocess.Popen(command, stdout=quiet, stderr=quiet, env=ENVIRONMENT))


@pytest.fixture(scope="module")
def dask() -> Iterator[Cluster]:
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0"]
    command += ["--host", "127.0.0.1", "--no-dashboard", "--no-show"]
    scheduler = subprocess.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert scheduler.stderr is not None
    found = None
    while found is None:
        line = scheduler.stderr.readline().decode()
        assert line, "the scheduler ended"
        found = re.search(r"tcp://127\.0\.0\.1:\d+", line)
    made = Cluster(found[0])
    for _ in range(2):
        made.add_worker()
    yield made
    for process in [*made.workers, scheduler]:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    names = [f"layers.{i}.q" for i in range(SHARDS)]
    weights = {f"{name}.weight": grid(SHAPE, BF16, i) for i, name in enumerate(names)}
    base = make_base(folder / "base", weights, shards=SHARDS)
    blocks = {name: block_for("bat", SHAPE, rank=64) for name in names}
    return base, make_adapter(folder / "adapter", "bat", rank=64, blocks=blocks)


def test_a_cluster_writes_the_same_bytes(
    dask: Cluster, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    merge(*inputs, tmp_path / "here")
    arguments = ["merge", *map(str, inputs), str(tmp_path / "there"), "--scheduler", dask.address]
    assert run(arguments) == 0
    assert snapshot(tmp_path / "there") == snapshot(tmp_path / "here")


@pytest.mark.slow
def test_a_worker_killed_midway_is_replaced(
    dask: Cluster, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    merge(*inputs, tmp_path / "here")

    class Killer:
        done = 0

        def start(self, total: int) -> None:
            pass

        def advance(self, nbytes: int) -> None:
            self.done += 1
            if self.done == 2:  # the first call says what was done before
                dask.workers[0].send_signal(signal.SIGKILL)

    with cluster(dask.address) as executor:
        merge(*inputs, tmp_path / "there", executor=executor, progress=Killer())
    assert dask.workers[0].wait(timeout=10) == -signal.SIGKILL
    assert snapshot(tmp_path / "there") == snapshot(tmp_path / "here")


def test_no_scheduler_is_the_network_s_fault(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("boneconv.engine.cluster._TIMEOUT", "1s")
    start = time.monotonic()
    with pytest.raises(NetworkError, match="no Dask scheduler"), cluster("tcp://127.0.0.1:9"):
        pass
    assert time.monotonic() - start < 20
    arguments = ["merge", *map(str, inputs), str(tmp_path / "out"), "--scheduler", "nonsense"]
    assert run(arguments) == 3
    assert not (tmp_path / "out").exists()
