"""Labs: inputs and the processes that run commands on them, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.crash.runs import Lab, available
from tests.crash.scenarios import Scenario

collect_ignore_glob = [] if available() else ["test_*.py"]

LabFor = Callable[[Scenario], Lab]


@pytest.fixture(scope="package")
def lab_for(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabFor]:
    """The lab in which a scenario can be run; its processes end with these tests."""
    labs: dict[tuple[str, ...], Lab] = {}
    with ExitStack() as stack:

        def find(scenario: Scenario) -> Lab:
            loads = scenario.loads
            if loads not in labs:
                folder = tmp_path_factory.mktemp("crash") / "lab"
                labs[loads] = stack.enter_context(Lab(folder, loads))
            return labs[loads]

        yield find
