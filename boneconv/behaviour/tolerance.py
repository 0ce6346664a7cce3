r"""How far a candidate's answers may be off, derived from what float32 itself does.

Let e be the difference from the reference, and y that of the yardstick: the same merge made and
computed in float32 by torch. A candidate passes when ``RMS(e) <= 5 RMS(y)`` and
``max|e| <= 10 max|y|``. On SmolLM2-135M with trained adapters, honest graphs in ONNX Runtime reach
an RMS ratio of 1.3 on text and 2.5 on random tokens; one linear layer of 210 left unpatched gives
600, one zeroed row of a block 300, one layer rounded to bfloat16 135. Neither ``allclose`` nor
top-1 agreement tells these apart.

**Half precision.** Rounding all weights to bfloat16 moves the answers seven times further than one
zeroed row does, so the distance from the unrounded reference says little. The reference is
therefore the correctly rounded one: the exact merged weights, each rounded once to the dtype that
the candidate has it in, computed in float64. The yardstick is the merge formed in float32, rounded
to that dtype and computed in float32. It holds what honest merges differ by: a weight whose exact
value lies within float32's error of a rounding midpoint, and so comes out one unit in the last
place off. In a small model there may be none of those by chance, so the yardstick allows
`_MISROUNDED` weights of the N adapted ones: with E the RMS that rounding all of them causes (an
error of variance ulp^2 / 12 in each), k weights off by a whole ulp cause about
``E sqrt(12 k / N)``. Canonical bfloat16 merges reach 0.03 times this yardstick; one unpatched layer
of SmolLM2's 210 gives 270, one layer rounded to float8 120, one zeroed row 20, half a block's last
columns left as they were 15.

A graph in half precision runs in float32 (`boneconv.behaviour.widening`), and keeps more in half
precision than weights: tables of cosines and sines, constants. In onnxruntime-genai's float16 graph
of SmolLM2 these cost 0.17 E, in traced graphs next to nothing; one zeroed row costs 1.2 E, one
unpatched layer 17 E. For graphs the yardstick is at least E / 12, so that the limit is 0.42 E.

PEFT's double rounding moves a quarter of BAT's weights by an ulp, about ``1.8 E``. Where it is
accepted, the yardstick is at least E.

**Control.** A comparison in which the base without the adapter would pass proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from boneconv.behaviour.report import Distance, InputSet

__all__ = ["MAX_LIMIT", "NEAR_TIE", "RMS_LIMIT", "allowed", "is_near_tie", "judged", "proves"]

RMS_LIMIT, MAX_LIMIT = 5.0, 10.0
#: Two logits that are this close are as good as equal in float32.
NEAR_TIE = 1e-4

#: Weights that may be one ulp off where none is expected to be.
_MISROUNDED = 4
#: What a graph keeps in half precision beside its weights, in the effect of rounding these.
_TABLES = 1 / 12
#: The share of weights that a float32 merge may round the other way where that was not measured.
_SHARE = 2.0**-12


def allowed(
    measured: Distance,
    rounding: Distance | None,
    adapted: int,
    *,
    twice: bool = False,
    unmeasured: bool = False,
    graph: bool = False,
) -> Distance:
    """The yardstick of a set of inputs.

    Args:
        measured: float32 torch against the reference.
        rounding: The rounded reference against the unrounded; None where nothing is rounded.
        adapted: How many weights the adapters change.
        twice: Whether rounding twice is accepted.
        unmeasured: Whether ``measured`` does not hold what rounding a float32 merge does.
        graph: Whether the candidate is a graph.
    """
    if rounding is None:
        return measured
    share = _MISROUNDED / max(adapted, _MISROUNDED)
    factor = math.sqrt(12 * (share + (_SHARE if unmeasured else 0.0)))
    factor = max(factor, _TABLES if graph else 0.0)
    factor = max(factor, 1.0) if twice else min(factor, 1.0)
    return replace(
        measured,
        rms=math.hypot(measured.rms, factor * rounding.rms),
        max_abs=math.hypot(measured.max_abs, factor * rounding.max_abs),
        mean_abs=math.hypot(measured.mean_abs, factor * rounding.mean_abs),
    )


def judged(
    name: str,
    decides: bool,
    counts: tuple[int, int],
    candidate: Distance,
    yardstick: Distance,
    control: Distance,
    rounding: Distance | None,
) -> InputSet:
    """A set of inputs with its ratios; ``counts`` are inputs and positions."""
    rms = _ratio(candidate.rms, yardstick.rms)
    largest = _ratio(candidate.max_abs, yardstick.max_abs)
    return InputSet(
        name=name,
        decides=decides,
        inputs=counts[0],
        positions=counts[1],
        candidate=candidate,
        yardstick=yardstick,
        control=control,
        rounding=rounding,
        rms_ratio=rms,
        max_ratio=largest,
        passed=rms <= RMS_LIMIT and largest <= MAX_LIMIT,
    )


def proves(sets: Iterable[InputSet]) -> bool:
    """Whether the base without the adapter would fail in one of the sets."""
    return any(
        _ratio(each.control.rms, each.yardstick.rms) > RMS_LIMIT
        or _ratio(each.control.max_abs, each.yardstick.max_abs) > MAX_LIMIT
        for each in sets
    )


def is_near_tie(gap: float, yardstick: Distance) -> bool:
    """Whether two logits lie so close that errors within the limits may swap them."""
    return gap <= max(NEAR_TIE, 2 * MAX_LIMIT * yardstick.max_abs)


def _ratio(value: float, unit: float) -> float:
    """``value / unit``; NaN becomes infinity, which no limit lets pass."""
    if math.isnan(value) or math.isnan(unit):
        return math.inf
    if unit == 0:
        return 0.0 if value == 0 else math.inf
    return value / unit
