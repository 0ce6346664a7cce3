"""Two runs on one OUT, at the same time."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.builders import snapshot
from tests.crash.runs import Lab, Outcome, Tally
from tests.crash.scenarios import Scenario

__all__ = ["RACES", "race"]


def _merge(adapter: str, *rest: str) -> Scenario:
    arguments = ("merge", "{inputs}/base", f"{{inputs}}/{adapter}", "out", "--workers", "1")
    return Scenario(f"merge of {adapter} {rest}", (*arguments, "--quiet", *rest))


#: Pairs of commands that write one output.
RACES = {
    "with different adapters": (_merge("adapter"), _merge("other")),
    "with equal adapters": (_merge("adapter"), _merge("adapter")),
    "with --force": (_merge("adapter", "--force"), _merge("other", "--force")),
}


def race(lab: Lab, pair: Sequence[Scenario], times: int, seed: int) -> Tally:
    """Starts both, one a random moment after the other; neither may disturb the other."""
    tally, rng = Tally(), random.Random(seed)
    longest = max(lab.undisturbed(scenario).seconds for scenario in pair)
    for number in range(times):
        folder = lab.fresh(pair[0])
        order = rng.sample([0, 1], 2)
        lab.start(pair[order[0]], folder, server=order[0])
        time.sleep(rng.choice([0.0, rng.random() * longest]))
        lab.start(pair[order[1]], folder, server=order[1])
        outcomes = [lab.server(place).result() for place in (0, 1)]
        problem = next(_problems(lab, pair, folder, outcomes), None)
        if problem is None:
            tally.survived += 1
        else:
            tally.lost.append(f"race {number} of {pair[0].name} and {pair[1].name}: {problem}")
        tally.faults += 1
        tally.exits.update(outcome.code for outcome in outcomes)
        shutil.rmtree(folder)
    return tally


def _problems(
    lab: Lab, pair: Sequence[Scenario], folder: Path, outcomes: Sequence[Outcome]
) -> Iterator[str]:
    for outcome in outcomes:
        is_locked = outcome.code == 3 and "another run is writing this output" in outcome.said
        is_refused = outcome.code == 2 and "the output exists already" in outcome.said
        if outcome.code != 0 and not is_locked and not is_refused:
            yield f"it ended with {outcome.code}: {outcome.said}"
    won = [place for place, outcome in enumerate(outcomes) if outcome.code == 0]
    if not won:
        yield "none of the two was through"
    if len(won) == 2 and "--force" not in pair[0].arguments:
        yield "both were through"
    if snapshot(folder) not in [lab.expected(pair[place]) for place in won]:
        yield f"what is left is not what one of them makes: {sorted(snapshot(folder))}"
