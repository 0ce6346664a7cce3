"""Work space that one thread reuses over its calls."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from boneconv.kernels.stage import Array

__all__ = ["Scratch"]


class Scratch:
    """Named buffers, grown on demand. Not to be shared between threads.

    A worker's loop and the kernels that it calls take from one: no name may serve both.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}
        self._taken: dict[str, Array] = {}  # the last view of each

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised array, contiguous; the previous one of that name becomes invalid."""
        last = self._taken.get(name)
        if last is not None and last.shape == shape and last.dtype == dtype:
            return last
        wanted = math.prod(shape) * np.dtype(dtype).itemsize
        held = self._buffers.get(name)
        if held is None or held.nbytes < wanted:
            self._buffers.pop(name, None)
            self._taken.pop(name, None)
            held = self._buffers[name] = np.empty(-(-wanted // 64) * 8, np.float64)
        taken: Array = held.view(np.uint8)[:wanted].view(dtype).reshape(shape)
        self._taken[name] = taken
        return taken
