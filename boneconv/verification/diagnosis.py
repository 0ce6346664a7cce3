"""Why a tensor fails: which mistake explains what the candidate holds there.

A mistake explains a sample if, rounded to the candidate's dtype, it leaves less than a fiftieth of
the squared error that the correct merge leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from boneconv.dtypes import FLOATS
from boneconv.engine.plan import Action
from boneconv.engine.station import stages_of
from boneconv.io.safetensors import Tensor
from boneconv.kernels import Stage
from boneconv.kernels.stage import Array, rank_of
from boneconv.verification.alternatives import Alternative, alternatives, expected
from boneconv.verification.measures import Measures
from boneconv.verification.pairs import Pair, source_rows
from boneconv.verification.samples import Run, runs_of, tensor_rows
from boneconv.verification.ulps import rounded

__all__ = ["Diagnosis", "Doctor"]

_EXPLAINED = 0.02
_EXPLAINED_AGAIN = 0.001
#: After so many tensors in a row that nothing explained, only the plainest mistakes are tried.
_PATIENCE = 12
_PLAINEST = 3
_TRANSPOSED_BYTES = 1 << 28
_PEFT_SHARE = 1e-3
_LOCAL = 0.05


@dataclass(frozen=True)
class Diagnosis:
    """What a tensor is instead.

    Attributes:
        code: The finding's code.
        text: For people, to follow the tensor's name.
    """

    code: str
    text: str


class Doctor:
    """Diagnoses tensors; what explained one is tried first on the next.

    Args:
        base: The base's tensors by name.
    """

    def __init__(self, base: dict[str, Tensor]) -> None:
        self._base = base
        self._last: Diagnosis | None = None
        self._misses = 0

    def diagnose(self, pair: Pair, found: Measures) -> Diagnosis | None:
        """What explains a tensor that failed; None where nothing does."""
        if pair.planned.dtype not in FLOATS or found.wrong == 0:
            return None
        if found.nonfinite:
            count = "all" if found.nonfinite == found.elements else f"{found.nonfinite:,}"
            return Diagnosis("not-finite", f"{count} of its elements are NaN or infinite")
        if pair.planned.updates:
            return self._merged(pair, found)
        return self._plain(pair, found)

    def transposed(self, pair: Pair) -> Diagnosis | None:
        """Whether a tensor of swapped sides is the transposed one."""
        stages = stages_of(pair.planned) if pair.planned.updates else []
        return Diagnosis("transposed", "is transposed") if _is_transposed(pair, stages) else None

    def _plain(self, pair: Pair, found: Measures) -> Diagnosis | None:
        planned = pair.planned
        runs = runs_of(pair, [], found.first)
        if all(not run.have.any() for run in runs):
            return Diagnosis("zeroed", "is zero")
        old = self._base.get(planned.name)
        replaced = planned.action in (Action.REPLACE, Action.ADD)
        if replaced and old is not None and old.shape == planned.shape and old.dtype in FLOATS:
            dtype = FLOATS[planned.dtype]
            columns = planned.matrix_shape[1]
            same = all(
                np.array_equal(
                    tensor_rows(old, run.first, len(run.have), columns).astype(dtype), run.have
                )
                for run in runs
            )
            if same:
                return Diagnosis("not-replaced", "equals the base: the adapter's was not put there")
        rounding = (a for a in alternatives([], planned.matrix_shape, FLOATS[planned.dtype]))
        return _explain(runs, [], (a for a in rounding if a.code == "double-rounding"))

    def _merged(self, pair: Pair, found: Measures) -> Diagnosis | None:
        planned = pair.planned
        stages = stages_of(planned)
        if found.wrong >= _PEFT_SHARE * found.elements and found.unexplained == 0:
            share = 1 - found.share_correct
            return Diagnosis(
                "double-rounding",
                f"was rounded twice, as PEFT does in {FLOATS[planned.dtype].name}: {share:.1%} of "
                "its elements are not the correctly rounded ones",
            )
        runs = runs_of(pair, stages, found.first)
        if all(not run.have.any() for run in runs):
            return Diagnosis("zeroed", "is zero")
        target = FLOATS[planned.dtype]
        tried = list(alternatives(stages, planned.matrix_shape, target))
        again = [a for a in tried if Diagnosis(a.code, a.text) == self._last]
        diagnosis = _explain(runs, stages, again, _EXPLAINED_AGAIN)
        if diagnosis is not None:
            return diagnosis
        if self._misses >= _PATIENCE:
            tried = tried[:_PLAINEST]
        diagnosis = _explain(runs, stages, tried) or _other_scale(runs, stages, pair)
        if diagnosis is None and _is_transposed(pair, stages):
            diagnosis = Diagnosis("transposed", "is transposed")
        if diagnosis is None or found.wrong < found.elements * _LOCAL:
            diagnosis = _in_part(pair, found, stages) or diagnosis
        self._last = diagnosis
        self._misses = 0 if diagnosis is not None else self._misses + 1
        return diagnosis


def _explain(
    runs: Sequence[Run],
    stages: Sequence[Stage],
    tried: Iterable[Alternative],
    enough: float = _EXPLAINED,
) -> Diagnosis | None:
    """The first alternative that explains the runs exactly, else the best that does well enough."""
    want = [rounded(expected(run, stages), run.have.dtype) for run in runs]
    have = [run.have.astype(np.float64) for run in runs]
    whole = _square(have, want)
    best, least = None, enough
    if whole == 0:
        return None
    for alternative in tried:
        values = [alternative.compute(run) for run in runs]
        if any(value is None for value in values):
            continue
        other = [
            rounded(value, run.have.dtype)
            for value, run in zip(values, runs, strict=True)
            if value is not None
        ]
        score = _square(have, other) / whole
        if score < least:
            best, least = alternative, score
        if score == 0:
            break
    return None if best is None else Diagnosis(best.code, best.text)


def _square(one: Sequence[Array], other: Sequence[Array]) -> float:
    with np.errstate(all="ignore"):
        return float(sum(np.square(a - b).sum() for a, b in zip(one, other, strict=True)))


def _other_scale(runs: Sequence[Run], stages: Sequence[Stage], pair: Pair) -> Diagnosis | None:
    """Whether the whole update was applied at another strength, found by least squares."""
    if len(stages) != 1:
        return None
    base = [run.base.astype(np.float64) for run in runs]
    have = [run.have.astype(np.float64) for run in runs]
    update = [expected(run, stages) - old for run, old in zip(runs, base, strict=True)]
    norm = float(sum(np.vdot(u, u) for u in update))
    dot = sum(np.vdot(u, h - b) for u, h, b in zip(update, have, base, strict=True))
    if norm == 0:
        return None
    share = float(dot / norm)
    alternative = Alternative(
        "wrong-scale",
        f"the adapter was applied at scale {share * stages[0].scale:.3g}, not {stages[0].scale:g}",
        lambda run: run.base + share * (expected(run, stages) - run.base.astype(np.float64)),
    )
    return _explain(runs, stages, [alternative]) if abs(share - 1) > 1e-3 else None


def _in_part(pair: Pair, found: Measures, stages: Sequence[Stage]) -> Diagnosis | None:
    """Whether only some elements are wrong, and what these are."""
    if found.as_base == found.wrong and found.wrong < found.elements:
        return Diagnosis(
            "partly-applied",
            f"{found.wrong:,} of its {found.elements:,} elements equal the base: the adapter was "
            "applied to a part only",
        )
    if found.wrong < found.elements * _LOCAL:
        row, column = divmod(found.first[0], pair.planned.matrix_shape[1])
        noun = "element is" if found.wrong == 1 else "elements are"
        return Diagnosis(
            "elements-differ",
            f"{found.wrong:,} {noun} wrong, the first at row {row}, column {column}",
        )
    return None


def _is_transposed(pair: Pair, stages: Sequence[Stage]) -> bool:
    """Whether rows of the expected weight are columns of the candidate's."""
    rows, columns = pair.planned.matrix_shape
    held = pair.held
    if len(held.shape) != 2 or held.shape != (columns, rows) or held.dtype not in FLOATS:
        return False
    if held.nbytes > _TRANSPOSED_BYTES:
        return False
    count = min(rows, rank_of(stages[0]) if stages else 4)
    base = source_rows(pair.planned, 0, count)
    want = expected(Run(0, base, base), stages) if stages else base.astype(np.float64)
    found = _first_columns(held, count)
    target = FLOATS[held.dtype]
    close = np.abs(rounded(want, target) - found.astype(np.float64))
    scale = np.abs(want) * 2.0**-7 + np.abs(want).max(initial=0.0) * 2.0**-9
    return bool((close <= scale).mean() > 0.99)


def _first_columns(tensor: Tensor, count: int) -> Array:
    """The first columns of a matrix, as rows."""
    rows, columns = tensor.shape
    step = max(1, (1 << 20) // max(1, columns))
    parts = [
        tensor_rows(tensor, first, min(step, rows - first), columns)[:, :count].copy()
        for first in range(0, rows, step)
    ]
    joined: Any = np.concatenate(parts)
    return np.ascontiguousarray(joined.T)
