"""SmolLM2-135M with the adapters that PEFT trained on it: there and back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import boneconv
from tests.builders import snapshot
from tests.oracle import real


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A folder that is too large to be kept after the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_a_real_base_comes_back_to_the_last_byte(
    cache: Path, large: Path, variant: real.Variant
) -> None:
    base, adapter, delta = real.smollm2(cache), real.trained(cache, variant), large / "delta"
    boneconv.merge(base, adapter, large / "merged", keep_delta=delta)
    result = boneconv.unmerge(large / "merged", adapter, large / "back", delta=delta)
    assert result.exact
    assert result.worst_condition < 2
    found, expected = snapshot(large / "back"), snapshot(base)
    found.pop("boneconv.json")
    assert found == expected
    share = delta.stat().st_size / sum(map(len, expected.values()))
    print(f"{variant}: the delta file has {100 * share:.1f} % of the base's size")  # noqa: T201
    assert share < 0.05
