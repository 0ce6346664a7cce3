"""Two runs on one OUT never mix: one is through, the other waits its turn or is refused."""

from __future__ import annotations

import pytest

from tests.crash.conftest import LabFor
from tests.crash.races import RACES, race


@pytest.mark.parametrize("name", RACES)
@pytest.mark.parametrize("times", [17, pytest.param(50, marks=pytest.mark.slow)])
def test_two_runs_on_one_output(lab_for: LabFor, name: str, times: int) -> None:
    pair = RACES[name]
    tally = race(lab_for(pair[0]), pair, times, seed=times)
    assert tally.lost == []
    assert tally.survived == times
    assert tally.exits[0] >= times
