"""Running a command and measuring its whole process tree: wall and CPU time, or peak memory."""

from __future__ import annotations

import re
import resource
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_INTERVAL = 0.05
_FIELD = re.compile(rb"^(Pss|Pss_Anon):\s+(\d+) kB", re.M)


@dataclass(frozen=True)
class Timing:
    """Seconds of wall clock, and of user and system time of all processes."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Memory:
    """Peaks over a process tree, in bytes: resident (shared pages counted once) and anonymous."""

    resident: int
    anonymous: int


def time_run(command: list[str]) -> Timing:
    """Runs a command to its end; raises CalledProcessError if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Timing(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def memory_run(command: list[str]) -> Memory:
    """Runs a command and samples its memory; not to be timed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    resident = anonymous = 0
    while process.poll() is None:
        samples = [_sample(pid) for pid in _tree(process.pid)]
        resident = max(resident, sum(sample[0] for sample in samples))
        anonymous = max(anonymous, sum(sample[1] for sample in samples))
        time.sleep(_INTERVAL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Memory(resident, anonymous)


def _tree(pid: int) -> list[int]:
    """A process and its descendants (Linux)."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [pid, *(found for child in text.split() for found in _tree(int(child)))]


def _sample(pid: int) -> tuple[int, int]:
    try:
        fields = dict(_FIELD.findall(Path(f"/proc/{pid}/smaps_rollup").read_bytes()))
    except OSError:
        return 0, 0
    return 1024 * int(fields.get(b"Pss", 0)), 1024 * int(fields.get(b"Pss_Anon", 0))
