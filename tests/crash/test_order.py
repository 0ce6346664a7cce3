"""Power loss: all that gets its name has been flushed before, and its name is flushed after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.crash.conftest import LabFor
from tests.crash.order import published, read_trace, unflushed
from tests.crash.scenarios import SCENARIOS
from tests.crash.shim import Fault


@pytest.mark.parametrize("name", SCENARIOS)
def test_all_is_flushed_before_the_rename(lab_for: LabFor, name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    lab = lab_for(scenario)
    folder, trace = lab.fresh(scenario), tmp_path / "trace"
    assert lab.run(scenario, folder, Fault(trace=str(trace))).code == 0
    calls = read_trace(trace)
    assert len(published(calls)) == len(scenario.outputs)
    assert list(unflushed(calls)) == []


def _renaming(tmp_path: Path, *before: dict[str, Any]) -> list[dict[str, Any]]:
    """A trace that ends with the publication of ``out``, a folder with one file."""
    out = str(tmp_path / "out.partial" / "out")
    place = tmp_path.stat().st_ino
    return [
        {"call": "fsync", "inode": place},
        *before,
        {
            "call": "rename",
            "path": out,
            "to": str(tmp_path / "out"),
            "tree": {out: 1, f"{out}/a": 2},
        },
        {"call": "fsync", "inode": place},
    ]


def test_what_is_unflushed_is_found(tmp_path: Path) -> None:
    out = str(tmp_path / "out.partial" / "out")
    made = {"call": "open", "path": f"{out}/a"}
    written, file, folder = (
        {"call": "pwrite", "inode": 2},
        {"call": "fsync", "inode": 2},
        {"call": "fsync", "inode": 1},
    )
    assert list(unflushed(_renaming(tmp_path, made, written, file, folder))) == []
    for wrong in (
        [made, file, written, folder],
        [made, written, folder],
        [folder, made, written, file],
        [made, written, file],
    ):
        assert len(list(unflushed(_renaming(tmp_path, *wrong)))) > 0
    assert len(list(unflushed(_renaming(tmp_path, made, written, file, folder)[:-1]))) == 1
