"""Updates compared as such, in float64, a band of rows at a time: for LoRA and other adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from boneconv.engine.plan import PlannedTensor
from boneconv.kernels import Stage
from boneconv.kernels.stage import Array, is_bat, rank_of
from boneconv.verification.alternatives import expected
from boneconv.verification.measures import Measures
from boneconv.verification.pairs import source_rows
from boneconv.verification.samples import Run

__all__ = ["Band", "bands_of", "compare_updates"]

_BAND_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Band:
    """Consecutive rows of a weight, and what the adapter adds to them.

    Attributes:
        place: Which rows.
        base: ``[n, in]`` float64.
        update: ``[n, in]`` float64: W' - W.
    """

    place: slice
    base: Array
    update: Array


def bands_of(planned: PlannedTensor, stages: Sequence[Stage]) -> Iterator[Band]:
    """The rows of a weight, in whole row blocks of BAT."""
    rows, columns = planned.matrix_shape
    unit = math.lcm(*(rank_of(stage) for stage in stages if is_bat(stage)))
    step = unit * max(1, _BAND_ELEMENTS // max(1, columns * unit))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        base = source_rows(planned, first, count)
        wide = base.astype(np.float64)
        update = expected(Run(first, base, base), stages) - wide
        yield Band(slice(first, first + count), wide, update)


def compare_updates(
    planned: PlannedTensor, stages: Sequence[Stage], candidate: Callable[[Band], Array]
) -> Measures:
    """Measures a candidate's update against the exact one.

    The errors are those of the updates: ``error`` is the sum of ``(U - dW)**2``, ``value`` that of
    ``dW**2``.

    Args:
        planned: The merged weight.
        stages: Its updates.
        candidate: Computes a band of the candidate's update U, ``[n, in]`` float64.
    """
    found = Measures()
    for band in bands_of(planned, stages):
        error = candidate(band) - band.update
        norm = float(np.vdot(band.update, band.update))
        found += Measures(
            elements=error.size,
            differing=int(np.count_nonzero(error)),
            nonfinite=int(np.count_nonzero(~np.isfinite(error))),
            max_abs=float(np.abs(error).max(initial=0.0)),
            error=float(np.vdot(error, error)),
            cross=float(np.vdot(error, band.update)),
            update=norm,
            base=float(np.vdot(band.base, band.base)),
            value=norm,
        )
    return found
