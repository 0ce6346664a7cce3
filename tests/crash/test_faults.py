"""A full disk, a broken disk, signals and short writes, at every call that writes.

A full or broken disk ends a run with code 3, a message that says so, no OUT (or what it was
before), and the same command completes once the disk is well again. Signals and short writes are no
faults: the run completes.
"""

from __future__ import annotations

import errno

import pytest

from tests.crash.conftest import LabFor
from tests.crash.runs import at_calls
from tests.crash.scenarios import SCENARIOS
from tests.crash.shim import Fault

ERRORS = [errno.ENOSPC, errno.EIO]
THOROUGH = "merge, 2 workers"


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_error_at_some_calls(lab_for: LabFor, name: str, error: int) -> None:
    scenario = SCENARIOS[name]
    most = 20 if name == THOROUGH else 4
    tally = at_calls(lab_for(scenario), scenario, "error", error=error, most=most, seed=error)
    assert tally.lost == []
    assert tally.exits[3] >= most // 2


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_error_at_every_call(lab_for: LabFor, name: str, error: int) -> None:
    scenario = SCENARIOS[name]
    tally = at_calls(lab_for(scenario), scenario, "error", error=error)
    assert tally.lost == []
    assert tally.exits[3] >= 25


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_signal_before_every_call(lab_for: LabFor, name: str) -> None:
    """Python takes up a call again that a signal has interrupted (EINTR, PEP 475)."""
    scenario = SCENARIOS[name]
    lab = lab_for(scenario)
    tally = lab.disturb(scenario, Fault("signal"))
    assert tally.lost == []
    assert tally.exits == {0: 1}
    assert tally.faults >= 40


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_write_is_short(lab_for: LabFor, name: str) -> None:
    scenario = SCENARIOS[name]
    tally = lab_for(scenario).disturb(scenario, Fault("short"))
    assert tally.lost == []
    assert tally.exits == {0: 1}
    assert tally.faults >= 20
