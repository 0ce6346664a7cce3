"""Running commands with faults, and judging what they leave."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from tests.builders import snapshot
from tests.crash.scenarios import Scenario, make_inputs
from tests.crash.shim import Fault

__all__ = ["Lab", "Outcome", "Server", "Tally", "at_calls", "available", "random_kills"]

Snapshot = dict[str, bytes]
_RETRIES = 100


def available() -> bool:
    """Whether the system has what the shim needs: forks, process groups, positioned writes."""
    return sys.platform == "linux"


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        code: Its exit code; negative for the signal that killed it.
        calls: How many calls were counted.
        faults: How many faults happened.
        hung: Whether it had to be ended because it went on for ever.
        seconds: How long it ran.
        said: Its stdout and stderr.
    """

    code: int
    calls: int
    faults: int
    hung: bool
    seconds: float
    said: str


class Server:
    """A process of `tests.crash.server`; a context manager."""

    def __init__(self, loads: Sequence[str] = ()) -> None:
        one_thread = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.server", *loads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **one_thread},
        )

    def start(self, arguments: list[str], folder: Path, said: Path, fault: Fault) -> None:
        """Runs a command line in a folder; its messages go to the file ``said``."""
        request = {
            "arguments": arguments,
            "folder": str(folder),
            "said": str(said),
            "fault": asdict(fault),
            "check_here": arguments[0] == "export-onnx",
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self._said = said

    def result(self) -> Outcome:
        """Waits for the command that was started."""
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline())
        return Outcome(**answer, said=self._said.read_text(errors="replace"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        if self._process.stdout is not None:
            self._process.stdout.close()


@dataclass
class Tally:
    """How many disturbances came to what.

    Attributes:
        survived: After these all was as it should be.
        faults: How many faults there were in all: some kinds have many in a run.
        missed: The command was through before its turn came: nothing was disturbed.
        lost: What was wrong after the others.
        exits: How often the disturbed commands ended with which exit code.
    """

    survived: int = 0
    faults: int = 0
    missed: int = 0
    lost: list[str] = field(default_factory=list)
    exits: Counter[int] = field(default_factory=Counter)

    def __iadd__(self, other: Tally) -> Self:
        self.survived += other.survived
        self.faults += other.faults
        self.missed += other.missed
        self.lost += other.lost
        self.exits += other.exits
        return self


class Lab:
    """Inputs, and servers to run commands on them; a context manager.

    Args:
        folder: A folder of its own.
        loads: Large modules that the servers import once for all commands.
    """

    def __init__(self, folder: Path, loads: Sequence[str] = ()) -> None:
        self.folder, self.inputs = folder, folder / "inputs"
        self.inputs.mkdir(parents=True)
        make_inputs(self.inputs, graph="onnx" in loads)
        self._untouched = snapshot(self.inputs)
        self._stack = ExitStack()
        self._loads = loads
        self._servers: list[Server] = []
        self._expected: dict[str, tuple[Snapshot, Snapshot, Outcome]] = {}
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def server(self, number: int = 0) -> Server:
        """One of the servers; it is started when it is first asked for."""
        while len(self._servers) <= number:
            self._servers.append(self._stack.enter_context(Server(self._loads)))
        return self._servers[number]

    def fresh(self, scenario: Scenario) -> Path:
        """A folder with what lies there before."""
        self._number += 1
        folder = self.folder / f"run-{self._number}"
        folder.mkdir()
        scenario.before(folder)
        return folder

    def run(self, scenario: Scenario, folder: Path, fault: Fault | None = None) -> Outcome:
        """Runs a command to its end, good or bad."""
        self.start(scenario, folder, fault)
        return self.server().result()

    def start(
        self, scenario: Scenario, folder: Path, fault: Fault | None = None, server: int = 0
    ) -> None:
        """Starts a command on one of the servers."""
        arguments = [each.format(inputs=self.inputs) for each in scenario.arguments]
        said = self.folder / f"said-{server}"
        self.server(server).start(arguments, folder, said, fault or Fault())

    def undisturbed(self, scenario: Scenario) -> Outcome:
        """What the command does when nothing disturbs it."""
        return self._undisturbed(scenario)[2]

    def expected(self, scenario: Scenario) -> Snapshot:
        """What it leaves then."""
        return self._undisturbed(scenario)[1]

    def disturb(self, scenario: Scenario, fault: Fault) -> Tally:
        """Runs a command with a fault, judges what it leaves, and runs it again."""
        folder = self.fresh(scenario)
        outcome = self.run(scenario, folder, fault)
        tally = Tally(exits=Counter([outcome.code]), faults=outcome.faults)
        if not outcome.faults:
            tally.missed = 1
        problem = next(self._problems(scenario, folder, fault, outcome), None)
        if problem is not None:
            tally.lost.append(f"{scenario.name}, {fault}: {problem}")
        elif outcome.faults:
            tally.survived = 1
        shutil.rmtree(folder)
        return tally

    def _undisturbed(self, scenario: Scenario) -> tuple[Snapshot, Snapshot, Outcome]:
        if scenario.name not in self._expected:
            folder = self.fresh(scenario)
            before = snapshot(folder)
            outcome = self.run(scenario, folder)
            assert outcome.code == 0, outcome
            self._expected[scenario.name] = before, snapshot(folder), outcome
            shutil.rmtree(folder)
        return self._expected[scenario.name]

    def _problems(
        self, scenario: Scenario, folder: Path, fault: Fault, outcome: Outcome
    ) -> Iterator[str]:
        """What is wrong, as far as one looks; nothing is if there is nothing."""
        before, expected, _ = self._undisturbed(scenario)
        if outcome.hung:
            yield "it went on for ever"
        yield from _bad_exit(fault, outcome)
        yield from self._half_visible(scenario, folder, outcome)
        whole = self._is_whole(scenario, folder)
        if outcome.code == 3 and fault.kind == "error":
            left = {name: each for name, each in snapshot(folder).items() if not _is_work(name)}
            if left != before:
                yield f"it failed with an error and left {sorted(left)}"
        again = self._run_until_free(scenario, folder)
        if again.code != 0 and not (again.code == 2 and whole and "exists already" in again.said):
            yield f"run again, it ended with {again.code}: {again.said}"
        left = snapshot(folder)
        if left != expected:
            names = sorted(set(left) ^ set(expected)) or "other bytes"
            yield f"run again, it left {names}"
        if snapshot(self.inputs) != self._untouched:
            yield "the inputs were changed"

    def _half_visible(self, scenario: Scenario, folder: Path, outcome: Outcome) -> Iterator[str]:
        """Outputs that are neither absent, nor whole, nor what they were before."""
        before, expected, _ = self._undisturbed(scenario)
        for output in scenario.outputs:
            held = _below(snapshot(folder), output)
            if held and held not in (_below(expected, output), _below(before, output)):
                yield f"{output} is half visible: {sorted(held)}"
        names = {name.split("/")[0] for name in snapshot(folder)}
        strangers = names - {*scenario.outputs, *(f"{each}.partial" for each in scenario.outputs)}
        if strangers:
            yield f"it left {sorted(strangers)}"
        if outcome.code == 0 and not self._is_whole(scenario, folder):
            yield "it ended well, but the output is not whole"

    def _is_whole(self, scenario: Scenario, folder: Path) -> bool:
        held, expected = snapshot(folder), self.expected(scenario)
        return all(_below(held, each) == _below(expected, each) for each in scenario.outputs)

    def _run_until_free(self, scenario: Scenario, folder: Path) -> Outcome:
        """The workers of a process that was killed alone hold its lock until they notice."""
        outcome = self.run(scenario, folder)
        for _ in range(_RETRIES):
            if outcome.code != 3 or "another run is writing" not in outcome.said:
                break
            outcome = self.run(scenario, folder)
        return outcome


def at_calls(
    lab: Lab,
    scenario: Scenario,
    kind: str,
    *,
    error: int = 0,
    most: int | None = None,
    seed: int = 0,
) -> Tally:
    """The same fault at every call of a command, one run for each.

    Args:
        lab: Where.
        scenario: The command.
        kind: The kind of `Fault`.
        error: The number of the error.
        most: Only at so many calls, which the seed chooses; the first and the last are among them.
        seed: Chooses.
    """
    last = lab.undisturbed(scenario).calls
    points: Sequence[int] = range(1, last + 1)
    if most is not None and most < last:
        points = sorted({1, last, *random.Random(seed).sample(points, most - 2)})
    tally = Tally()
    for at in points:
        tally += lab.disturb(scenario, Fault(kind, at, error))
    return tally


def random_kills(lab: Lab, scenario: Scenario, count: int, seed: int) -> Tally:
    """SIGKILL at random times, a few of them after the end."""
    tally, rng = Tally(), random.Random(seed)
    longest = lab.undisturbed(scenario).seconds
    while tally.survived + len(tally.lost) < count:
        delay = max(0.001, rng.random() * longest)
        tally += lab.disturb(scenario, Fault("delay", delay=delay))
        if tally.missed > 3 * count + 10:
            longest *= 0.8
            tally.missed = 0
    return tally


def _bad_exit(fault: Fault, outcome: Outcome) -> Iterator[str]:
    if fault.kind in ("none", "short", "signal") or not outcome.faults:
        if outcome.code != 0:
            yield f"it ended with {outcome.code}: {outcome.said}"
    elif fault.kind == "error":
        if outcome.code not in (0, 3):
            yield f"it ended with {outcome.code}: {outcome.said}"
        if outcome.code == 3:
            yield from _bad_message(fault, outcome.said)
    elif fault.kind == "kill-one":
        if outcome.code not in (-9, 3):
            yield f"it ended with {outcome.code}: {outcome.said}"
    elif outcome.code != -9:
        yield f"it was to be killed, and ended with {outcome.code}: {outcome.said}"


def _bad_message(fault: Fault, said: str) -> Iterator[str]:
    says = "the disk is full" if fault.error == errno.ENOSPC else os.strerror(fault.error)
    if not said.startswith("Error: ") or says not in said or "Traceback" in said:
        yield f"an unclear message: {said}"


def _below(held: Snapshot, output: str) -> Snapshot:
    return {
        name: each for name, each in held.items() if name == output or name.startswith(f"{output}/")
    }


def _is_work(name: str) -> bool:
    return name.split("/")[0].endswith(".partial")
