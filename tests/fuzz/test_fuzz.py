"""Strangers' files, invented: a second of each reader by default, five where it is slow.

Each run draws the same cases. `benchmarks/fuzz.py` draws others, for as long as one likes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.builders import raw_file
from tests.fuzz.engine import fuzz, replay
from tests.fuzz.guard import Guard
from tests.fuzz.mutate import Case, Mutator, encode
from tests.fuzz.targets import TARGETS

QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["F32", "BF16", "BONE", "bat", "../x", "\x1b[2J", "a\nb"])
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "F4", "U8", "X"]),
        "shape": st.lists(st.integers(-1, 4) | st.sampled_from([2**31, 2**62]), max_size=4),
        "data_offsets": st.lists(st.integers(-4, 64), min_size=1, max_size=3),
    }
)
HEADERS = st.dictionaries(st.text(max_size=8), ENTRIES | VALUES, max_size=4)


def _assert_fit(name: str, case: Case, place: Path, guard: Guard) -> None:
    crash = replay(TARGETS[name], case, place, guard)
    assert crash is None, f"{crash}: {case}"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_mutations_are_read_or_refused(name: str, tmp_path: Path, guard: Guard) -> None:
    outcome = fuzz(TARGETS[name], tmp_path, guard, seed="suite", executions=3000, seconds=1.0)
    assert outcome.executions > 10
    assert not outcome.crashes, list(outcome.crashes.values())[:3]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_many_mutations_are_read_or_refused(name: str, tmp_path: Path, guard: Guard) -> None:
    outcome = fuzz(TARGETS[name], tmp_path, guard, seed="slow", executions=10**9, seconds=5.0)
    assert not outcome.crashes, list(outcome.crashes.values())[:3]


@QUICK
@given(value=VALUES)
def test_any_json(value: Any, tmp_path_factory: pytest.TempPathFactory, guard: Guard) -> None:
    place = tmp_path_factory.mktemp("json")
    for name in ("json", "config", "record", "document"):
        file = next(iter(TARGETS[name].seeds()[0]))
        _assert_fit(name, {file: encode({"a": value})}, place, guard)


@QUICK
@given(header=HEADERS, data=st.binary(max_size=64))
def test_any_header(
    header: dict[str, Any],
    data: bytes,
    tmp_path_factory: pytest.TempPathFactory,
    guard: Guard,
) -> None:
    place = tmp_path_factory.mktemp("header")
    content = raw_file(header, data)
    _assert_fit("safetensors", {"model.safetensors": content}, place, guard)
    _assert_fit("native", {"adapter_model.safetensors": content}, place, guard)
    _assert_fit("index", {"model.safetensors": content}, place, guard)


@QUICK
@given(content=st.binary(max_size=200))
def test_any_bytes(content: bytes, tmp_path_factory: pytest.TempPathFactory, guard: Guard) -> None:
    place = tmp_path_factory.mktemp("bytes")
    for name, file in (
        ("json", "a.json"),
        ("safetensors", "model.safetensors"),
        ("delta", "delta"),
        ("wire", "model.onnx"),
        ("onnx", "model.onnx"),
    ):
        _assert_fit(name, {file: content}, place, guard)


def test_the_same_seed_gives_the_same_cases() -> None:
    seeds = TARGETS["adapter"].seeds()
    drawn = [[Mutator(7).mutate(seeds[0], seeds) for _ in range(3)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert any(case != seeds[0] for case in drawn[0])
