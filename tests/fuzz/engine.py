"""Running a target on mutations of its seeds, for a while."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.guard import Crash, Guard
from tests.fuzz.mutate import Case, Mutator
from tests.fuzz.targets import Target, write_case

__all__ = ["Outcome", "clear", "fuzz", "read_corpus", "replay"]

_SECRET = b'{"secret": true}'
_POOL = 200


@dataclass
class Outcome:
    """What came of a run: the first case of every kind of crash, by its reason and place."""

    executions: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    crashes: dict[tuple[str, str], tuple[Crash, Case]] = field(default_factory=dict)


def clear(folder: Path) -> None:
    """Empties a folder that a case was written to."""
    for path in folder.iterdir():
        if path.is_dir():
            clear(path)
            path.rmdir()
        else:
            path.unlink()


def replay(target: Target, case: Case, place: Path, guard: Guard) -> Crash | None:
    """Runs a target on one case, in an empty folder below a place."""
    folder = place / "case"
    if folder.is_dir():
        clear(folder)
    else:
        folder.mkdir()
        for name in ("secret", "secret.safetensors"):
            (place / name).write_bytes(_SECRET)
    write_case(folder, case)
    return guard.run(target.read, folder)


def fuzz(
    target: Target, place: Path, guard: Guard, *, seed: str, executions: int, seconds: float
) -> Outcome:
    """Runs a target until the executions or the time are spent.

    Half of the mutations begin from a good case, half from an earlier mutation that was accepted or
    refused like any other; without coverage there is no telling which of them leads on.
    """
    mutator, outcome = Mutator(f"{target.name} {seed}"), Outcome()
    seeds = [*target.seeds(), *read_corpus(target)]
    pool = list(seeds)
    guard.slowest = 0.0
    start = time.monotonic()
    while outcome.executions < executions and time.monotonic() - start < seconds:
        source = mutator.random.choice(seeds if mutator.random.random() < 0.5 else pool)
        case = mutator.mutate(source, seeds)
        crash = replay(target, case, place, guard)
        outcome.executions += 1
        if crash is not None:
            key = (crash.reason.split(":")[0][:60], crash.where)
            outcome.crashes.setdefault(key, (crash, case))
        elif mutator.random.random() < 0.02:
            pool.append(case)
            if len(pool) > _POOL:
                pool.pop(mutator.random.randrange(len(seeds), len(pool)))
    outcome.seconds, outcome.slowest = time.monotonic() - start, guard.slowest
    return outcome


def read_corpus(target: Target) -> list[Case]:
    """The cases kept of a target: each a folder of files."""
    home = Path(__file__).parent / "corpus" / target.name
    folders = sorted(path for path in home.glob("*") if path.is_dir())
    return [{p.name: p.read_bytes() for p in sorted(f.iterdir())} for f in folders]
