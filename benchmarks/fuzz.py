"""Fuzzing for longer than the suite has time for.

    python benchmarks/fuzz.py [--executions N] [--seconds S] [--seed TEXT] [--targets A,B]

Runs every target of tests/fuzz for N executions or S seconds each, in a process of its own whose
address space may grow by 1 GiB. Mutations are drawn from the seed and know the formats; there is no
coverage feedback. The files of a crash are kept below --crashes; copy them to
tests/fuzz/corpus/TARGET/NAME once the hole is closed. Exit code 1 where anything crashed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: it holds an onnx.py

from tests.fuzz.engine import Outcome, fuzz  # noqa: E402
from tests.fuzz.guard import Guard  # noqa: E402
from tests.fuzz.mutate import Case  # noqa: E402
from tests.fuzz.targets import TARGETS, write_case  # noqa: E402

MEMORY = 1 << 30


@dataclass(frozen=True)
class Job:
    """How long a target runs, and from which seed."""

    executions: int
    seconds: float
    seed: str


def _limit_memory() -> None:
    """The address space may grow by `MEMORY` from here on (Linux)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def _child(name: str, job: Job, connection: Connection) -> None:
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as place:
        if name == "pth":
            import torch

            torch.set_num_threads(1)
        target.seeds()
        _limit_memory()
        outcome = fuzz(
            target,
            Path(place),
            Guard(),
            seed=job.seed,
            executions=job.executions,
            seconds=job.seconds,
        )
    connection.send(outcome)


def run_target(name: str, job: Job) -> Outcome | None:
    """What came of a target; None where its process died."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, job, sender))
    process.start()
    sender.close()
    try:
        outcome: Outcome | None = receiver.recv()
    except EOFError:
        outcome = None
    process.join()
    return outcome


def _keep(folder: Path, reason: str, case: Case) -> None:
    name = re.sub(r"\W+", "-", reason.lower()).strip("-")[:60]
    (folder / name).mkdir(parents=True, exist_ok=True)
    write_case(folder / name, case)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("boneconv", "numpy", "onnx", "protobuf", "torch")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _earlier(out: Path, seed: str) -> dict[str, Any]:
    """The rows of an account of the same seed and versions, which other targets are added to."""
    if not out.is_file():
        return {}
    account: dict[str, Any] = json.loads(out.read_text())
    same = account["seed"] == seed and account["versions"] == _versions()
    return dict(account["targets"]) if same else {}


def main() -> int:
    """Runs the targets one after the other and writes the account."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--executions", type=int, default=100_000, help="at most, per target")
    parser.add_argument("--seconds", type=float, default=120.0, help="at most, per target")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "fuzz.json")
    parser.add_argument("--crashes", type=Path, default=Path(tempfile.gettempdir()) / "crashes")
    options = parser.parse_args()
    job = Job(options.executions, options.seconds, options.seed)
    rows = _earlier(options.out, options.seed)
    for name in options.targets.split(","):
        outcome = run_target(name, job)
        if outcome is None:
            rows[name] = {"executions": 0, "seconds": 0.0, "crashes": ["the process died"]}
        else:
            rows[name] = {
                "executions": outcome.executions,
                "seconds": round(outcome.seconds, 1),
                "slowest_ms": round(outcome.slowest * 1000),
                "crashes": sorted({c.reason for c, _ in outcome.crashes.values()}),
            }
            for crash, case in outcome.crashes.values():
                _keep(options.crashes / name, f"{crash.where} {crash.reason}", case)
        print(name, json.dumps(rows[name]), flush=True)
        account = {
            "seed": options.seed,
            "engine": "seeded structure-aware mutation, no coverage feedback",
            "versions": _versions(),
            "executions": sum(row["executions"] for row in rows.values()),
            "seconds": round(sum(row["seconds"] for row in rows.values()), 1),
            "crashes": sum(len(row["crashes"]) for row in rows.values()),
            "targets": rows,
        }
        options.out.write_text(json.dumps(account, indent=2) + "\n")
    return int(any(row["crashes"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
