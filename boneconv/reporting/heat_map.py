"""Heat maps: a measure of the adapted weights over layers and kinds of modules.

A cell's shade is one of `STEPS`, so that a page needs no style of its own for any cell. A layer may
have several weights of one kind (experts): its cell shows the largest.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from boneconv.reporting.summary import ADAPTED
from boneconv.reporting.text import number
from boneconv.verification.report import Status, TensorAction, TensorReport

__all__ = ["STEPS", "Cell", "HeatMap", "heat_map", "short", "shown_tensors"]

#: Shades above zero; shade 0 is for zero alone.
STEPS = 8

Measure = Callable[[TensorReport], float | None]


@dataclass(frozen=True)
class Cell:
    """The weights of one kind in one layer.

    Attributes:
        names: Their names.
        value: The largest value; None where nothing was measured.
        step: Its shade: 0 for zero, 1 to `STEPS` above; None where nothing was measured.
        failed: Whether one of them failed.
    """

    names: tuple[str, ...]
    value: float | None
    step: int | None
    failed: bool


@dataclass(frozen=True)
class HeatMap:
    """Cells by kind and layer.

    Attributes:
        layers: The columns: numbers of layers, and None for weights outside of layers.
        rows: For each kind its name and a cell for each column; None where there is no weight.
        lowest: The smallest value above zero; None where there is none.
        bounds: The largest value of each shade from 1 on, which divide the logarithms of the
            values into equal parts; empty where all values are zero.
    """

    layers: tuple[int | None, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    lowest: float | None
    bounds: tuple[float, ...]

    @property
    def cells(self) -> int:
        """How many weights are shown."""
        return sum(len(cell.names) for _, cells in self.rows for cell in cells if cell)


def shown_tensors(tensors: Iterable[TensorReport]) -> list[TensorReport]:
    """The tensors that belong on a map: the adapted ones, and those missing that should be."""
    return [
        tensor
        for tensor in tensors
        if tensor.action in ADAPTED
        or (tensor.action is TensorAction.MISSING and tensor.module is not None)
    ]


def heat_map(tensors: Sequence[TensorReport], measure: Measure) -> HeatMap:
    """The map of a measure over tensors.

    Args:
        tensors: What to show.
        measure: The value of a tensor, not negative; None where it has none.
    """
    places: dict[tuple[str, int | None], list[TensorReport]] = defaultdict(list)
    for tensor in tensors:
        places[tensor.kind or tensor.name, tensor.layer].append(tensor)
    numbers = sorted({layer for _, layer in places if layer is not None})
    outside = any(layer is None for _, layer in places)
    layers: tuple[int | None, ...] = (*numbers, *([None] if outside else []))
    values = {place: _largest(map(measure, found)) for place, found in places.items()}
    scale = _Scale([value for value in values.values() if value])

    def cell(kind: str, layer: int | None) -> Cell | None:
        found = places.get((kind, layer))
        if found is None:
            return None
        value = values[kind, layer]
        failed = any(tensor.status is Status.FAIL for tensor in found)
        return Cell(tuple(t.name for t in found), value, scale.step(value), failed)

    kinds = dict.fromkeys(kind for kind, _ in places)
    rows = tuple((kind, tuple(cell(kind, layer) for layer in layers)) for kind in kinds)
    return HeatMap(layers, rows, scale.lowest, scale.bounds)


def _largest(values: Iterable[float | None]) -> float | None:
    known = [math.inf if math.isnan(value) else value for value in values if value is not None]
    return max(known, default=None)


class _Scale:
    """From values above zero to shades."""

    def __init__(self, values: Sequence[float]) -> None:
        finite = [value for value in values if math.isfinite(value)]
        self.lowest = min(finite, default=None)
        self.bounds: tuple[float, ...] = ()
        if self.lowest is None:
            return
        high = max(finite)
        start, width = math.log(self.lowest), math.log(high) - math.log(self.lowest)
        steps = [math.exp(start + width * i / STEPS) for i in range(1, STEPS)]
        self.bounds = (*(min(step, high) for step in steps), high)

    def step(self, value: float | None) -> int | None:
        if value is None or value == 0:
            return None if value is None else 0
        if value >= max(self.bounds, default=0):
            return STEPS
        return next((i for i, bound in enumerate(self.bounds, 1) if value <= bound), STEPS)


def short(value: float | None) -> str:
    """A value in as few characters as a cell has room for."""
    if value is None or value == 0 or not math.isfinite(value):
        return number(value)
    if value < 1000 and value == int(value):
        return str(int(value))
    if 0.01 <= value < 10:
        return f"{value:.2f}".removeprefix("0")
    if 10 <= value < 1000:
        return f"{value:.0f}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
