"""How much memory a comparison takes, and how much there is."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["available_memory", "predict_memory"]

#: torch, transformers and ONNX Runtime; and the forward passes' own tensors.
_LIBRARIES, _PASSES = 700 * 10**6, 100 * 10**6


def predict_memory(parameters: int, largest: int, answers: int, itemsize: int) -> int:
    """Bytes of resident memory at the peak, while the reference is formed.

    Args:
        parameters: How many parameters the model has.
        largest: How many the largest weight has: it is there twice while its update is formed.
        answers: How many numbers the kept answers hold, as float64.
        itemsize: Bytes of a number of the reference: 8 or 4.
    """
    model = itemsize * (parameters + 2 * largest)
    return _LIBRARIES + _PASSES + model + 8 * answers


def available_memory() -> int:
    """Bytes that this process may still take: what is free, within the control group's limit."""
    found = [_free()]
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        found.append(limit - used + _cached())
    return max(min(found), 0)


def _free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cached() -> int:
    """Pages of files, which count as used and can be dropped."""
    try:
        for line in Path("/sys/fs/cgroup/memory.stat").read_text(encoding="ascii").splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
