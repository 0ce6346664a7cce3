"""The limits: what passes, what does not, and what proves nothing."""

from __future__ import annotations

import math

import pytest

from boneconv.behaviour.report import Distance, InputSet
from boneconv.behaviour.tolerance import allowed, is_near_tie, judged, proves


def distance(rms: float, largest: float | None = None) -> Distance:
    return Distance(rms, rms * 4 if largest is None else largest, rms / 2)


def judge(candidate: Distance, *, control: float = 1.0) -> InputSet:
    unit = distance(1e-5, 4e-5)
    return judged("text", True, (1, 1), candidate, unit, distance(control), None)


@pytest.mark.parametrize(
    ("rms", "largest", "passed"),
    [
        (0.0, 0.0, True),
        (4.99e-5, 3.99e-4, True),
        (5.01e-5, 1e-4, False),
        (1e-5, 4.01e-4, False),
        (math.nan, 1e-5, False),
        (1e-5, math.nan, False),
        (math.inf, math.inf, False),
    ],
)
def test_five_times_the_rms_and_ten_times_the_maximum(
    rms: float, largest: float, passed: bool
) -> None:
    assert judge(distance(rms, largest)).passed is passed


def test_the_base_must_fail_for_agreement_to_prove_anything() -> None:
    assert proves([judge(distance(1e-5), control=1.0)])
    assert not proves([judge(distance(1e-5), control=1e-5)])
    assert not proves([judge(distance(0.0), control=0.0)])


def test_float32_is_its_own_yardstick() -> None:
    assert allowed(distance(1e-5), None, 10**6) == distance(1e-5)


def test_in_half_precision_a_few_weights_may_be_an_ulp_off() -> None:
    found = allowed(distance(3e-6), distance(1e-2), 48 * 10**6)
    assert found.rms == pytest.approx(math.hypot(3e-6, 1e-2 * 1e-3))


def test_never_more_than_all_of_them() -> None:
    found = allowed(distance(0.0), distance(1e-2), 1)
    assert found.rms == pytest.approx(1e-2)


def test_rounding_twice_is_allowed_where_it_is_asked_for() -> None:
    once, twice = (
        allowed(distance(1e-5), distance(1e-2), 10**9, twice=each) for each in (False, True)
    )
    assert once.rms < 2e-5
    assert twice.rms == pytest.approx(1e-2, rel=1e-3)


def test_a_graph_in_half_precision_may_hold_tables_in_it() -> None:
    found = allowed(distance(1e-6), distance(1.2e-2), 10**9, graph=True)
    assert found.rms == pytest.approx(1e-3, rel=1e-3)


def test_near_ties() -> None:
    assert is_near_tie(1e-4, distance(0.0))
    assert not is_near_tie(1.01e-4, distance(0.0))
    assert is_near_tie(0.1, distance(1e-2, 0.005))
