"""Killed at any instant: OUT absent or whole, inputs untouched, and the same command completes.

Every run is judged the same way (`tests.crash.runs`): no output is half visible, nothing lies about
but OUT.partial, base and adapter are as they were, and the same command, run again, leaves exactly
the files and bytes of a run that nothing disturbed. Where a kill came after the output had been
published whole, that run may say that it exists already instead.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.builders import snapshot
from tests.crash.conftest import LabFor
from tests.crash.runs import Tally, at_calls, random_kills
from tests.crash.scenarios import SCENARIOS
from tests.crash.shim import Fault

#: This is killed at every call by default, the others at some.
THOROUGH = "merge, 2 workers"
OTHERS = [name for name in SCENARIOS if name != THOROUGH]

COMMAND = [sys.executable, "-c", "from boneconv.cli import main; main()"]


def _none_lost(tally: Tally, least: int) -> None:
    assert tally.lost == []
    assert tally.survived >= least


@pytest.mark.slow
def test_killed_at_every_call_that_writes(lab_for: LabFor) -> None:
    scenario = SCENARIOS[THOROUGH]
    _none_lost(at_calls(lab_for(scenario), scenario, "kill"), 100)


@pytest.mark.parametrize("name", OTHERS)
def test_killed_at_some_calls_that_write(lab_for: LabFor, name: str) -> None:
    scenario = SCENARIOS[name]
    _none_lost(at_calls(lab_for(scenario), scenario, "kill", most=9, seed=1), 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_command_killed_at_every_call(lab_for: LabFor, name: str) -> None:
    scenario = SCENARIOS[name]
    _none_lost(at_calls(lab_for(scenario), scenario, "kill"), 40)


@pytest.mark.parametrize("name", ["merge, 2 workers", "merge --keep-delta"])
def test_killed_in_the_middle_of_a_write(lab_for: LabFor, name: str) -> None:
    scenario = SCENARIOS[name]
    _none_lost(at_calls(lab_for(scenario), scenario, "torn", most=12, seed=2), 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_command_killed_in_the_middle_of_every_write(lab_for: LabFor, name: str) -> None:
    scenario = SCENARIOS[name]
    _none_lost(at_calls(lab_for(scenario), scenario, "torn"), 40)


@pytest.mark.parametrize("name", ["merge, 2 workers", "merge --each"])
def test_one_process_is_killed_and_the_others_are_not(lab_for: LabFor, name: str) -> None:
    """A worker's death ends the run with code 3; a parent's death ends the workers."""
    scenario = SCENARIOS[name]
    _none_lost(at_calls(lab_for(scenario), scenario, "kill-one", most=15, seed=3), 13)


@pytest.mark.parametrize("name", ["merge, 2 workers", "merge --force"])
def test_killed_at_random_times(lab_for: LabFor, name: str) -> None:
    scenario = SCENARIOS[name]
    _none_lost(random_kills(lab_for(scenario), scenario, 10, seed=4), 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_command_killed_at_random_times(lab_for: LabFor, name: str) -> None:
    scenario = SCENARIOS[name]
    _none_lost(random_kills(lab_for(scenario), scenario, 20, seed=5), 20)


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_the_command_as_a_shell_starts_it_killed_at_random_times(
    lab_for: LabFor, tmp_path: Path, count: int
) -> None:
    scenario = SCENARIOS["merge, 2 workers"]
    lab = lab_for(scenario)
    command = COMMAND + [each.format(inputs=lab.inputs) for each in scenario.arguments]
    begin = time.monotonic()
    (tmp_path / "whole").mkdir()
    subprocess.run(command, cwd=tmp_path / "whole", check=True, capture_output=True, timeout=120)
    longest = time.monotonic() - begin
    expected, rng, killed = snapshot(tmp_path / "whole"), random.Random(6), 0
    assert expected == lab.expected(scenario)
    for number in range(3 * count):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = subprocess.Popen(
            command, cwd=folder, start_new_session=True, stdout=-3, stderr=-3
        )
        time.sleep(longest * (0.3 + 0.7 * rng.random()))
        is_alive = process.poll() is None
        if is_alive:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        out = snapshot(folder / "out") if (folder / "out").exists() else None
        assert out in (None, snapshot(tmp_path / "whole" / "out"))
        again = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert again.returncode == 0 or (again.returncode == 2 and out is not None), again.stderr
        assert snapshot(folder) == expected
        killed += is_alive
        if killed == count:
            break
    assert killed == count


def test_a_delta_file_that_lost_its_merge_is_not_taken_for_another_s(lab_for: LabFor) -> None:
    """Killed between the two names: other adapters are refused at once, the same ones go on."""
    scenario = SCENARIOS["merge --keep-delta"]
    lab = lab_for(scenario)
    other = replace(
        scenario, arguments=tuple(each.replace("/adapter", "/other") for each in scenario.arguments)
    )
    for again, code in ((scenario, 0), (other, 2)):
        for at in range(lab.undisturbed(scenario).calls, 0, -1):
            folder = lab.fresh(scenario)
            lab.run(scenario, folder, Fault("kill", at))
            if (folder / "kept.delta").exists() and not (folder / "out").exists():
                break
        else:
            pytest.fail("there is no such moment")
        outcome = lab.run(again, folder)
        assert outcome.code == code, outcome.said
        if code == 0:
            assert snapshot(folder) == lab.expected(scenario)
        else:
            assert "kept.delta: the output exists already" in outcome.said
            assert not (folder / "out").exists()
