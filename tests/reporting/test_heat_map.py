"""Heat maps: places, shades, and what a cell of several weights shows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.reporting.heat_map import STEPS, heat_map, short, shown_tensors
from boneconv.verification.report import TensorReport
from tests.reporting.reports import failed, honest, norm, spoilt, weight


def update(tensor: TensorReport) -> float | None:
    return tensor.update_norm


def test_kinds_by_layers_in_order() -> None:
    head = replace(weight(1), name="lm_head.weight", layer=None, kind="lm_head")
    tensors = [weight(3, "up_proj"), weight(0), weight(3), head]
    found = heat_map(tensors, update)
    assert found.layers == (0, 3, None)
    assert {
        kind: [None if cell is None else cell.names for cell in cells] for kind, cells in found.rows
    } == {
        "up_proj": [None, (tensors[0].name,), None],
        "q_proj": [(tensors[1].name,), (tensors[2].name,), None],
        "lm_head": [None, None, (tensors[3].name,)],
    }
    assert found.cells == 4


def test_a_cell_of_several_weights_shows_the_largest_and_whether_one_failed() -> None:
    experts = [weight(0, update_norm=0.1), failed(0, update_norm=0.4), weight(0, update_norm=None)]
    ((_, (cell,)),) = heat_map(experts, update).rows
    assert cell is not None
    assert (len(cell.names), cell.value, cell.step, cell.failed) == (3, 0.4, STEPS, True)


def test_zero_and_nothing_have_shades_of_their_own() -> None:
    tensors = [weight(0, update_norm=0.0), weight(1, update_norm=None), weight(2, update_norm=1.0)]
    ((_, cells),) = heat_map(tensors, update).rows
    assert [cell.step for cell in cells if cell] == [0, None, STEPS]
    assert heat_map(tensors[:2], update).bounds == ()


def test_what_is_not_finite_is_darkest_and_stretches_no_scale() -> None:
    tensors = [weight(i, update_norm=v) for i, v in enumerate((math.inf, math.nan, 1.0, 0.1))]
    found = heat_map(tensors, update)
    assert [cell.step for cell in found.rows[0][1] if cell] == [STEPS, STEPS, STEPS, 1]
    assert found.bounds[-1] == 1.0


@given(st.lists(st.floats(0, 1e30, allow_subnormal=False), min_size=1, max_size=40))
def test_shades_follow_the_values(values: list[float]) -> None:
    tensors = [weight(i, update_norm=value) for i, value in enumerate(values)]
    found = heat_map(tensors, update)
    cells = [cell for cell in found.rows[0][1] if cell]
    pairs = sorted((cell.value, cell.step) for cell in cells)
    assert [step for _, step in pairs] == sorted(step for _, step in pairs)
    assert all((step == 0) == (value == 0) for value, step in pairs)
    assert all(0 <= step <= STEPS for _, step in pairs)
    assert list(found.bounds) == sorted(found.bounds)
    assert pairs[-1][1] in (0, STEPS)


def test_only_what_the_adapter_changes_is_shown() -> None:
    assert [t.name for t in shown_tensors([weight(0), norm(0)])] == [weight(0).name]
    assert [t.action for t in shown_tensors(spoilt().tensors)] == ["merge"] * 4 + ["missing"]
    assert len(shown_tensors(honest(2).tensors)) == 14


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (0.0312, ".03"), (3.456, "3.46"), (34.56, "35"), (212.0, "212")),
        *((1e-5, "1e-5"), (123456.0, "1e5"), (None, "-"), (math.inf, "inf"), (1.0, "1")),
    ],
)
def test_values_fit_their_cells(value: float | None, text: str) -> None:
    assert short(value) == text
    assert len(text) <= 5
