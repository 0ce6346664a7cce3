"""A few rows of a failing tensor, for its diagnosis: a bounded number of elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from boneconv.config import Axis, Variant
from boneconv.engine.compute import read_rows
from boneconv.io.files import Reader
from boneconv.io.safetensors import StoredTensor, Tensor
from boneconv.kernels import Stage
from boneconv.kernels.stage import Array, is_bat, rank_of
from boneconv.verification.pairs import Pair, source_rows

__all__ = ["Run", "cut", "runs_of", "tensor_rows"]

_RUN_ELEMENTS = 1 << 16
_RUNS = 2


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one weight.

    Attributes:
        first: The first row.
        base: ``[n, in]`` of the source.
        have: ``[n, in]`` of the candidate.
    """

    first: int
    base: Array
    have: Array


def runs_of(pair: Pair, stages: Sequence[Stage], around: Sequence[int]) -> list[Run]:
    """Rows around some flat indices, in whole row blocks of BAT.

    Args:
        pair: What is compared.
        stages: The updates, which say how rows are coupled.
        around: Flat indices of elements that should be among them.
    """
    rows, columns = pair.planned.matrix_shape
    unit = math.lcm(*(rank_of(stage) for stage in stages if is_bat(stage)))
    count = min(rows, max(1, _RUN_ELEMENTS // max(1, columns * unit)) * unit)
    starts = {min(index // columns // unit * unit, rows - count) for index in around}
    starts = {start // unit * unit for start in starts} or {0}
    chosen = [*sorted(starts)[: _RUNS - 1], max(starts)]
    return [
        Run(
            first,
            source_rows(pair.planned, first, min(count, rows - first)),
            tensor_rows(pair.held, first, min(count, rows - first), columns),
        )
        for first in dict.fromkeys(chosen)
    ]


def tensor_rows(tensor: Tensor, first: int, count: int, columns: int) -> Array:
    """Consecutive rows of a tensor, as an array of their own."""
    if isinstance(tensor, StoredTensor):
        with Reader(tensor.path) as reader:
            return read_rows(tensor, reader, first, (count, columns))
    return read_rows(tensor, None, first, (count, columns))


def cut(stage: Stage, first: int, count: int) -> Stage:
    """What a stage does to some rows of its weight, as a stage of a weight of those rows alone."""
    block = stage.block
    if is_bat(stage):
        if stage.axis is Axis.IN:
            return stage
        r = rank_of(stage)
        return replace(stage, block=block[first // r : -(-(first + count) // r)])
    rows = np.arange(first, first + count) % block.shape[1]
    return replace(stage, variant=Variant.BONE, block=block[:, rows])
