"""What an honest merge may give for an element: the interval that its arithmetic can reach.

With n roundings on the way of any term, a sum of terms computed in float32 in any order, with FMA
or without, is off by at most ``g * (sum of |terms|)``, ``g = n u / (1 - n u)``, ``u = 2**-24``
(Higham 2002, section 3.1). For ``V + S (V @ B + B)`` with rank r that gives

    radius' = radius + |S| (radius @ |B|) + g (size + |S| (size @ |B| + |B|)),   n = r + 8

where *size* bounds |V| and everything added on the way to it; Bone and mini have no product. A
candidate is what such a merge may give if it lies between the roundings of ``exact - radius`` and
``exact + radius``: one ULP off only where the exact value is within the radius of a midpoint, more
only where cancellation leaves a result whose ULP is smaller than the radius. A radius in float32
is 2**29 times the error of the float64 that it is computed in, which `_WIDER` covers.

PEFT 0.18.1 merges BAT in half precision as ``round(W + round(W @ B + B))``; the block itself may
have been rounded when the model was loaded, and on a device that multiplies in half precision the
product is rounded as well. These are the *habits*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from boneconv.config import Axis
from boneconv.dtypes import F64
from boneconv.kernels.general import block_update
from boneconv.kernels.stage import Array, Stage, is_bat, rank_of
from boneconv.verification.ulps import ordered_double, rounded

__all__ = ["PEFT_HABITS", "SINGLE", "Habit", "Reach"]

_GATHERED = 1 << 18  # float64 numbers that are gathered at a time
_ROW_ELEMENTS = 1 << 17
_WIDER = 1 + 2.0**-20
_TINY = 2.0**-125  # what flushed subnormals take away, for each term


@dataclass(frozen=True)
class Habit:
    """Where a merge rounds to the target's dtype on the way.

    Attributes:
        update: BAT's update, before it is added.
        block: The block, before anything.
        product: ``W @ B``, before B is added.
        stages: The weight, after each adapter.
    """

    update: bool = False
    block: bool = False
    product: bool = False
    stages: bool = False


#: Accumulates in float32 and rounds once.
SINGLE = Habit()
#: What PEFT does in half precision: on a CPU, with a rounded block, on a device.
PEFT_HABITS = (
    Habit(update=True, stages=True),
    Habit(update=True, block=True, stages=True),
    Habit(update=True, block=True, product=True, stages=True),
)


@dataclass(frozen=True)
class _Ball:
    """Float64 values with how far off they may be, and a bound on all that went into them."""

    center: Array
    radius: Array
    size: Array


class Reach:
    """The intervals of one weight's elements.

    Args:
        stages: The adapters' updates, in order.
        target: The dtype of the candidate.
    """

    def __init__(self, stages: Sequence[Stage], target: np.dtype[Any]) -> None:
        self._stages = tuple(stages)
        self._target = target
        self._unit = 2.0**-52 if target == F64 else 2.0**-24
        self._rounded: tuple[Stage, ...] | None = None

    def interval(
        self, rows: Array, first_row: int, where: Array, habit: Habit = SINGLE
    ) -> tuple[Array, Array]:
        """The lowest and the highest result of each element, as `ordered` integers.

        Args:
            rows: ``[n, in]``, consecutive rows of the weight.
            first_row: The weight's row that ``rows[0]`` is.
            where: Flat indices into ``rows``, ascending.
            habit: Where the merge rounds on the way.
        """
        stages = self._blocks_rounded() if habit.block else self._stages
        by_element = not any(is_bat(stage) for stage in stages[1:])
        width = rank_of(stages[0]) if is_bat(stages[0]) else 1
        if by_element and len(where) * width <= rows.size:
            step = max(1, _GATHERED // width)
            parts = [where[i : i + step] for i in range(0, len(where), step)]
            balls = [self._elements(rows, first_row, part, stages, habit) for part in parts]
        else:
            balls = self._rows(rows, first_row, where, stages, habit)
        lows, highs = [], []
        with np.errstate(all="ignore"):
            for ball in balls:
                radius = ball.radius * (2.0 if self._target == F64 else _WIDER)
                lows.append(ordered_double(ball.center - radius, self._target))
                highs.append(ordered_double(ball.center + radius, self._target))
        return np.concatenate(lows), np.concatenate(highs)

    def _elements(
        self, rows: Array, first_row: int, where: Array, stages: Sequence[Stage], habit: Habit
    ) -> _Ball:
        """Single elements; only the first stage may multiply."""
        i, j = np.divmod(where, rows.shape[1])
        values = rows.reshape(-1)[where].astype(np.float64)
        ball = _Ball(values, np.zeros_like(values), np.abs(values))
        for stage in stages:
            own = _block_elements(stage, first_row + i, j)
            product = None
            if is_bat(stage):
                product = _gathered_product(rows, first_row, where, stage)
            ball = self._advance(ball, product, own, stage, habit)
        return ball

    def _rows(
        self, rows: Array, first_row: int, where: Array, stages: Sequence[Stage], habit: Habit
    ) -> list[_Ball]:
        """Whole rows, those that hold any of the elements, a few at a time."""
        columns = rows.shape[1]
        i, j = np.divmod(where, columns)
        step = max(1, _ROW_ELEMENTS // columns)
        balls = []
        for start in range(0, len(rows), step):
            mine = (i >= start) & (i < start + step)
            if not mine.any():
                continue
            chosen, back = np.unique(i[mine], return_inverse=True)
            values = rows[chosen].astype(np.float64)
            ball = _Ball(values, np.zeros_like(values), np.abs(values))
            for stage in stages:
                index = first_row + chosen
                own = np.concatenate([block_update(stage, int(k), (1, columns)) for k in index])
                product = _product(ball, stage, index) if is_bat(stage) else None
                ball = self._advance(ball, product, own, stage, habit)
            parts = (ball.center, ball.radius, ball.size)
            balls.append(_Ball(*(part[back, j[mine]] for part in parts)))
        return balls

    def _advance(
        self, ball: _Ball, product: _Ball | None, own: Array, stage: Stage, habit: Habit
    ) -> _Ball:
        """One stage, elementwise, from ``V @ B`` and the block's own part."""
        steps = (rank_of(stage) if product is not None else 1) + 8
        g = steps * self._unit / (1 - steps * self._unit)
        scale = stage.scale + stage.residue
        change, radius, size = own, np.zeros_like(own), np.abs(own)
        if product is not None:
            if habit.product:
                product = self._round(product, g)
            change = change + product.center
            radius = radius + product.radius
            size = size + product.size
        change, radius, size = change * scale, radius * abs(scale), size * abs(scale)
        if habit.update and product is not None:
            part = self._round(_Ball(change, radius, size), g)
            change, radius = part.center, part.radius
        again = 0.0 if scale == 1.0 else 2 * abs(scale)  # as S (W' - W), W comes in twice more
        total = ball.size * (1 + again) + size
        lost = g * total + _TINY * steps
        moved = _Ball(ball.center + change, ball.radius + radius + lost, ball.size + size + lost)
        return self._round(moved, 0.0) if habit.stages else moved

    def _round(self, ball: _Ball, g: float) -> _Ball:
        """What comes of rounding to the target's dtype anything in a ball."""
        radius = (ball.radius + g * ball.size) * _WIDER
        low = rounded(ball.center - radius, self._target)
        high = rounded(ball.center + radius, self._target)
        center = (low + high) / 2
        return _Ball(center, (high - low) / 2, np.maximum(np.abs(low), np.abs(high)))

    def _blocks_rounded(self) -> tuple[Stage, ...]:
        if self._rounded is None:
            self._rounded = tuple(
                replace(s, block=rounded(s.block.astype(np.float64), self._target))
                for s in self._stages
            )
        return self._rounded


def _block_elements(stage: Stage, row: Array, column: Array) -> Array:
    """The block's own part of single elements, in float64."""
    block = stage.block
    if is_bat(stage):
        r = rank_of(stage)
        number = row // r if stage.axis is Axis.OUT else column // r
        return np.asarray(block[number, row % r, column % r], np.float64)
    return np.asarray(block[column % block.shape[0], row % block.shape[1]], np.float64)


def _gathered_product(rows: Array, first_row: int, where: Array, stage: Stage) -> _Ball:
    """``W @ B`` at single elements."""
    r = rank_of(stage)
    tiles, k = np.divmod(where, r)
    i, tile = np.divmod(tiles, rows.shape[1] // r)
    number = (first_row + i) // r if stage.axis is Axis.OUT else tile
    weights = rows.reshape(-1, r)[tiles].astype(np.float64)
    columns = stage.block[number, :, k].astype(np.float64)
    center = np.vecdot(weights, columns)
    size = np.vecdot(np.abs(weights, out=weights), np.abs(columns, out=columns))
    return _Ball(center, np.zeros_like(center), size)


def _product(ball: _Ball, stage: Stage, index: Array) -> _Ball:
    """``V @ B`` of the weight's rows ``index``."""
    r = rank_of(stage)
    shape = ball.center.shape
    if stage.axis is Axis.OUT:
        numbers, back = np.unique(index // r, return_inverse=True)
        product = [np.empty(shape) for _ in range(3)]
        for n, number in enumerate(numbers):
            mine = back == n
            block = stage.block[number].astype(np.float64)
            for part, result, factor in zip(_parts(ball), product, _factors(block), strict=True):
                result[mine] = (part[mine].reshape(-1, r) @ factor).reshape(-1, shape[1])
        return _Ball(*product)
    block = stage.block.astype(np.float64)
    found = []
    for part, factor in zip(_parts(ball), _factors(block), strict=True):
        tiled = part.reshape(shape[0], shape[1] // r, r).transpose(1, 0, 2)
        found.append((tiled @ factor).transpose(1, 0, 2).reshape(shape))
    return _Ball(*found)


def _parts(ball: _Ball) -> tuple[Array, Array, Array]:
    return ball.center, ball.radius, ball.size


def _factors(block: Array) -> tuple[Array, Array, Array]:
    magnitude = np.abs(block)
    return block, magnitude, magnitude
