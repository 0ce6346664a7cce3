"""A Hub on loopback with runs against it, and an output with its place of work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.io.hub_runs import NURSERY, ROOT, Runner
from tests.io.hub_server import HubServer, hub

__all__ = ["hub"]


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def run(hub: HubServer, nursery: subprocess.Popen[str], tmp_path: Path) -> Runner:
    (tmp_path / "run").mkdir()
    return Runner(nursery, hub, tmp_path / "run" / "home")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def partial(out: Path) -> Path:
    return out.with_name("out.partial")
