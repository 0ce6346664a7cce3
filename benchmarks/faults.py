"""What boneconv survives: kills, failing disks, races and bad inputs, counted.

    python benchmarks/faults.py [--most N] [--races N] [--seed S]

Runs the engine of tests/crash on every command of its scenarios, the bad inputs of
tests/cli/test_bad_input.py, and takes the executions of the fuzzers from benchmarks/fuzz.json where
benchmarks/fuzz.py has left them. Writes benchmarks/faults.md. Linux only; needs the extra ``test``.
"""

from __future__ import annotations

import argparse
import errno
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path[0] = str(HERE.parent)  # not this folder: it holds an onnx.py

from tests.crash.races import RACES, race  # noqa: E402
from tests.crash.runs import Lab, Tally, at_calls, random_kills  # noqa: E402
from tests.crash.scenarios import SCENARIOS, Scenario  # noqa: E402
from tests.crash.shim import Fault  # noqa: E402

#: The commands that are disturbed at every call, whatever ``--most`` says.
THOROUGH = ("merge", "merge, 2 workers")
_BAD_INPUT = HERE.parent / "tests" / "cli" / "test_bad_input.py"


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    what: str
    count: int
    survived: int
    lost: int

    def __str__(self) -> str:
        return f"| {self.what} | {self.count:,} | {self.survived:,} | {self.lost:,} |"


def main() -> int:
    """Writes the report; 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=12, help="calls of a command that are tried")
    parser.add_argument("--random", type=int, default=10, help="random kills of a command")
    parser.add_argument("--races", type=int, default=50, help="of each kind")
    parser.add_argument("--seed", type=int, default=8)
    options = parser.parse_args()
    begin = time.monotonic()
    lost: list[str] = []
    tables = dict(_crashes(options, lost))
    tables["Bad inputs"] = [_bad_inputs(lost)]
    fuzz = HERE / "fuzz.json"
    tables["Fuzz executions"] = _fuzz(fuzz) if fuzz.exists() else []
    text = _report(tables, options, time.monotonic() - begin)
    (HERE / "faults.md").write_text(text)
    sys.stdout.write(text)
    for each in lost:
        sys.stderr.write(f"lost: {each}\n")
    return 1 if any(row.lost for rows in tables.values() for row in rows) else 0


def _crashes(options: argparse.Namespace, lost: list[str]) -> Iterator[tuple[str, list[Row]]]:
    most, seed = options.most, options.seed

    def at(kind: str, error: int = 0) -> Callable[[Lab, Scenario], Tally]:
        def run(lab: Lab, scenario: Scenario) -> Tally:
            limit = None if scenario.name in THOROUGH and kind in ("kill", "error") else most
            return at_calls(lab, scenario, kind, error=error, most=limit, seed=seed)

        return run

    kinds: dict[str, dict[str, Callable[[Lab, Scenario], Tally]]] = {
        "Kill points": {
            "SIGKILL before a call that writes": at("kill"),
            "SIGKILL in the middle of a write": at("torn"),
            "SIGKILL of one process of several": at("kill-one"),
            "SIGKILL at a random time": lambda lab, scenario: random_kills(
                lab, scenario, options.random, seed
            ),
        },
        "Injected faults": {
            "full disk (ENOSPC) at a call that writes": at("error", errno.ENOSPC),
            "broken disk (EIO) at a call that writes": at("error", errno.EIO),
            "signal (EINTR) before every call": lambda lab, scenario: lab.disturb(
                scenario, Fault("signal")
            ),
            "short write at every write": lambda lab, scenario: lab.disturb(
                scenario, Fault("short")
            ),
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        labs: dict[tuple[str, ...], Lab] = {}
        for heading, wanted in kinds.items():
            tallies = {what: Tally() for what in wanted}
            for number, scenario in enumerate(SCENARIOS.values()):
                if scenario.loads not in labs:
                    labs[scenario.loads] = Lab(Path(folder) / str(number), scenario.loads)
                for what, run in wanted.items():
                    tallies[what] += run(labs[scenario.loads], scenario)
                    _tell(f"{heading}: {what}: {scenario.name}")
            yield heading, [_row(what, tally) for what, tally in tallies.items()]
            lost += [each for tally in tallies.values() for each in tally.lost]
        rows = []
        for what, pair in RACES.items():
            tally = race(labs[()], pair, options.races, seed)
            rows.append(_row(f"two merges on one OUT, {what}", tally))
            lost += tally.lost
            _tell(f"races {what}")
        yield "Races", rows
        for lab in labs.values():
            lab.__exit__()


def _row(what: str, tally: Tally) -> Row:
    """Counts what happened: a run that was through before its fault's turn is not counted."""
    runs = tally.survived + len(tally.lost)
    if tally.faults > runs:  # many faults in a run
        return Row(what, tally.faults, tally.faults if not tally.lost else 0, len(tally.lost))
    return Row(what, runs, tally.survived, len(tally.lost))


def _bad_inputs(lost: list[str]) -> Row:
    """Every bad input of the suite, run by pytest in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(_BAD_INPUT)],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout.splitlines()[-1] if done.stdout else done.stderr
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (\w+)", said)}
    passed, bad = counts.get("passed", 0), counts.get("failed", 0) + counts.get("errors", 0)
    if done.returncode and not bad:
        bad = 1
    if bad:
        lost.append(f"bad inputs: {said}")
    return Row("bad inputs through the command line", passed + bad, passed, bad)


def _fuzz(path: Path) -> list[Row]:
    """A row for each fuzzed reader, as benchmarks/fuzz.py has written them."""
    return [
        Row(
            f"fuzzed {name}",
            each["executions"],
            each["executions"] - len(each["crashes"]),
            len(each["crashes"]),
        )
        for name, each in json.loads(path.read_text())["targets"].items()
    ]


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _report(tables: dict[str, list[Row]], options: argparse.Namespace, seconds: float) -> str:
    lines = [
        "# Faults",
        "",
        "Written by `python benchmarks/faults.py"
        f" --most {options.most} --random {options.random} --races {options.races}"
        f" --seed {options.seed}`, Python {platform.python_version()} on {platform.system()}.",
        "",
        "A command has survived a fault when its output is absent, whole, or what it was before;",
        "its inputs are untouched; nothing lies about but its place of work; and the same command,",
        "run again, leaves exactly the files and bytes of a run that nothing disturbed (or says",
        "that the output exists already, where the fault came after that had been published",
        "whole). With an error of the disk it has also ended with code 3, a message that says so,",
        "and no output; or, where only clearing up failed, with code 0 and the whole output.",
        "",
        "Of these commands, the first two meet SIGKILL, ENOSPC and EIO at every call; for the",
        f"rest the seed chooses {options.most} calls each. `pytest -m slow tests/crash` tries",
        "every call of every command.",
        "",
        *(f"- {name}" for name in SCENARIOS),
    ]
    for heading, rows in tables.items():
        lines += ["", f"## {heading}", ""]
        if rows:
            lines += ["| what | count | survived | lost |", "|---|---:|---:|---:|", *map(str, rows)]
        else:
            lines.append("Not run yet: `python benchmarks/fuzz.py` writes the figures.")
    total = [row for rows in tables.values() for row in rows]
    lines += [
        "",
        f"Lost in all: {sum(row.lost for row in total)} of {sum(row.count for row in total):,}.",
        f"Took {seconds / 60:.0f} minutes.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
