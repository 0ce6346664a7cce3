"""Comparing chunks: bytes first, and only where these differ numbers.

Sums over whole chunks are taken in float32 (a chunk has 131072 elements, so that they are good to
four digits), those over differing elements in float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from boneconv.dtypes import BF16, F16, F32, F64
from boneconv.kernels import Scratch
from boneconv.kernels.narrow import widen
from boneconv.kernels.stage import Array
from boneconv.verification.measures import Measures
from boneconv.verification.reach import PEFT_HABITS, Reach
from boneconv.verification.ulps import differing, ordered

__all__ = ["compare_chunk", "compare_merged"]

_FIRST = 4
_MANY = 16


def compare_merged(
    rows: Array, first_row: int, want: Array, have: Array, reach: Reach | None, scratch: Scratch
) -> Measures:
    """Compares some rows of a merged weight.

    Args:
        rows: ``[n, in]`` of the base.
        first_row: The weight's row that ``rows[0]`` is.
        want: The canonical rows.
        have: The candidate's, of the same dtype.
        reach: What honest merges may give; None counts all that is wrong as beyond them.
        scratch: Work space.
    """
    update, base, value = _norms(rows, want, scratch)
    whole = Measures(elements=want.size, update=update, base=base, value=value)
    where = differing(want, have)
    if not len(where):
        return whole
    old = rows.reshape(-1)[where].astype(np.float64)
    found, wrong = _differences(want, have, where, old, first_row * rows.shape[1])
    if len(wrong) > want.size // _MANY:  # now the sums have to cancel
        change = want.astype(np.float64) - rows.astype(np.float64)
        whole = replace(whole, update=float(np.vdot(change, change)))
    if not len(wrong):
        return whole + found
    if reach is None:
        counts = (len(wrong),) * len(PEFT_HABITS)
        return whole + found + Measures(beyond=len(wrong), beyond_peft=counts)
    beyond = _outside(rows, first_row, have, wrong, reach)
    peft: tuple[int, ...] = ()
    if want.dtype in (BF16, F16):
        peft = _outside_habits(rows, first_row, have, beyond, reach)
    return whole + found + Measures(beyond=len(beyond), beyond_peft=peft)


def compare_chunk(want: Array, have: Array, first: int, base: Array | None = None) -> Measures:
    """Compares elements that are no result of a merge.

    Args:
        want: What is expected.
        have: The candidate's, of the same dtype.
        first: The flat index of the first element in the tensor.
        base: The base's elements, where those are others.
    """
    value = 0.0
    where = differing(want, have)
    whole = Measures(elements=want.size)
    if not len(where):
        return whole
    with np.errstate(all="ignore"):
        wide = want.astype(np.float64).reshape(-1)
        value = float(np.vdot(wide, wide))
    old = wide[where] if base is None else base.reshape(-1)[where].astype(np.float64)
    found, wrong = _differences(want, have, where, old, first)
    return whole + found + Measures(value=value, beyond=len(wrong))


def _norms(rows: Array, want: Array, scratch: Scratch) -> tuple[float, float, float]:
    """``||want - rows||**2``, ``||rows||**2`` and ``||want||**2``."""
    if F64 in (rows.dtype, want.dtype):
        old, new = rows.astype(np.float64).reshape(-1), want.astype(np.float64).reshape(-1)
        change = new - old
    else:
        old = widen(rows, scratch, "old").reshape(-1)
        new = widen(want, scratch, "new").reshape(-1)
        change = np.subtract(new, old, out=scratch.take("change", new.shape, F32))
    with np.errstate(all="ignore"):
        return tuple(float(np.vdot(part, part)) for part in (change, old, new))  # type: ignore[return-value]


def _differences(
    want: Array, have: Array, where: Array, old: Array, first: int
) -> tuple[Measures, Array]:
    """Measures of differing elements, and the flat indices of those whose value is wrong."""
    kept, found = want.reshape(-1)[where], have.reshape(-1)[where]
    canonical, candidate = kept.astype(np.float64), found.astype(np.float64)
    usable = np.isfinite(candidate) & np.isfinite(canonical)
    distance = np.abs(ordered(found) - ordered(kept))
    wrong = (distance > 0) | ~usable
    distance, error = distance[usable], (candidate - canonical)[usable]
    moved = (canonical - old)[usable]
    places = where[wrong]
    measures = Measures(
        differing=len(where),
        wrong=len(places),
        as_base=int(np.count_nonzero((candidate == old.astype(kept.dtype)) & wrong)),
        nonfinite=int(np.count_nonzero(~np.isfinite(candidate))),
        max_ulp=float(distance.max(initial=0)),
        sum_ulp=float(distance.sum(dtype=np.float64)),
        max_abs=float(np.abs(error).max(initial=0.0)),
        error=float(np.vdot(error, error)),
        cross=float(np.vdot(error, moved)),
        first=tuple(int(place) + first for place in places[:_FIRST]),
    )
    return measures, places


def _outside(
    rows: Array, first_row: int, have: Array, where: Array, reach: Reach, **habit: Any
) -> Array:
    """Those of some elements that lie outside their intervals."""
    low, high = reach.interval(rows, first_row, where, **habit)
    found = have.reshape(-1)[where]
    place = ordered(found)
    inside = (low <= place) & (place <= high) & np.isfinite(found.astype(np.float64))
    return np.asarray(where[~inside])


def _outside_habits(
    rows: Array, first_row: int, have: Array, where: Array, reach: Reach
) -> tuple[int, ...]:
    """How many of some elements each habit of PEFT leaves unexplained."""
    if not len(where):
        return (0,) * len(PEFT_HABITS)
    return tuple(
        len(_outside(rows, first_row, have, where, reach, habit=habit)) for habit in PEFT_HABITS
    )
