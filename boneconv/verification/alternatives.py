"""What else a merged weight may be: the mistakes that a diagnosis tries, each as a computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from boneconv.config import Axis
from boneconv.dtypes import BF16, F16, F32, F64, cli_name, name_of
from boneconv.errors import BoneconvError
from boneconv.kernels import Stage
from boneconv.kernels.reference import apply, delta
from boneconv.kernels.stage import Array, check_stage, is_bat, rank_of
from boneconv.verification.samples import Run, cut
from boneconv.verification.ulps import rounded

__all__ = ["Alternative", "alternatives", "expected"]

#: Computes some rows, in float64, from a run and the whole stages.
Compute = Callable[[Run, Sequence[Stage]], Array]


@dataclass(frozen=True)
class Alternative:
    """A mistake.

    Attributes:
        code: The finding's code.
        text: What the weight is then.
        compute: Computes it; None from it says that it cannot be here.
    """

    code: str
    text: str
    compute: Callable[[Run], Array | None]


def expected(run: Run, stages: Sequence[Stage]) -> Array:
    """The merged rows, in float64."""
    return apply(run.base, _cut_all(run, stages))


def alternatives(
    stages: Sequence[Stage], shape: tuple[int, int], target: np.dtype[Any]
) -> Iterator[Alternative]:
    """The mistakes that a weight's updates allow, the plainest first.

    Args:
        stages: The updates.
        shape: The weight's ``(out, in)``.
        target: The candidate's dtype.
    """
    yield Alternative(
        "not-applied",
        "equals the base: the adapter was not applied there",
        lambda run: run.base.astype(np.float64),
    )
    yield _by_stages("applied-twice", "the adapter was applied twice", [*stages, *stages])
    if len(stages) > 1:
        yield from _of_several(stages)
    for number, stage in enumerate(stages):
        for code, text, other in _wrong_stages(stage, shape):
            swapped = [*stages[:number], other, *stages[number + 1 :]]
            yield _by_stages(code, text, swapped)
    if any(is_bat(stage) for stage in stages):
        yield Alternative(
            "wrong-variant",
            "BAT's product was left out: W + B",
            lambda run: _without_product(run, stages),
        )
        yield Alternative(
            "wrong-variant",
            "BAT's block was left out: W + W @ B",
            lambda run: _without_block(run, stages),
        )
    yield from _by_rounding(stages, target)
    yield from _truncated(stages, shape)


def _by_stages(code: str, text: str, stages: Sequence[Stage]) -> Alternative:
    return Alternative(code, text, lambda run: expected(run, stages))


def _cut_all(run: Run, stages: Sequence[Stage]) -> list[Stage]:
    return [cut(stage, run.first, len(run.base)) for stage in stages]


def _of_several(stages: Sequence[Stage]) -> Iterator[Alternative]:
    for number in range(len(stages)):
        rest = [*stages[:number], *stages[number + 1 :]]
        text = f"adapter {number + 1} of {len(stages)} was not applied"
        yield _by_stages("adapter-missing", text, rest)
    yield _by_stages("wrong-order", "the adapters were applied in another order", stages[::-1])


def _wrong_stages(stage: Stage, shape: tuple[int, int]) -> Iterator[tuple[str, str, Stage]]:
    """One stage, misread."""
    block = stage.block
    if is_bat(stage):
        other = Axis.IN if stage.axis is Axis.OUT else Axis.OUT
        flipped = replace(stage, axis=other)
        if _fits(flipped, shape):
            text = f"BAT was applied over the {other} axis, not the {stage.axis} axis"
            yield "wrong-axis", text, flipped
        text = "the adapter's blocks were transposed"
        yield "transposed-block", text, replace(stage, block=block.transpose(0, 2, 1))
        return
    r, width = block.shape
    columns = shape[1]
    index = np.minimum(np.arange(columns) * r // columns, r - 1)
    spread = np.asarray(block[index])
    text = "each row of the block was repeated over neighbouring columns, not cycled through"
    yield "wrong-layout", text, replace(stage, block=spread)
    if width < shape[0]:
        rows = np.arange(shape[0]) * width // shape[0]
        text = "each column of the mini block was repeated over neighbouring rows, not cycled"
        yield "wrong-layout", text, replace(stage, block=np.asarray(block[:, rows]))
    if r == width:
        yield (
            "transposed-block",
            "the adapter's block was transposed",
            replace(stage, block=np.ascontiguousarray(block.T)),
        )


def _fits(stage: Stage, shape: tuple[int, int]) -> bool:
    try:
        check_stage(stage, shape)
    except BoneconvError:
        return False
    return True


def _without_product(run: Run, stages: Sequence[Stage]) -> Array:
    values = run.base.astype(np.float64)
    for stage in _cut_all(run, stages):
        weight = np.zeros_like(values) if is_bat(stage) else values
        values = values + stage.scale * delta(weight, stage)
    return values


def _without_block(run: Run, stages: Sequence[Stage]) -> Array:
    values = run.base.astype(np.float64)
    for stage in _cut_all(run, stages):
        change = delta(values, stage)
        if is_bat(stage):
            change = change - delta(np.zeros_like(values), stage)
        values = values + stage.scale * change
    return values


def _by_rounding(stages: Sequence[Stage], target: np.dtype[Any]) -> Iterator[Alternative]:
    """Through a narrower dtype on the way, at the end, at the start or between."""
    for lower in (BF16, F16):
        if lower == target:
            continue
        name = cli_name(name_of(lower))
        yield Alternative(
            "double-rounding",
            f"was rounded to {name} on the way",
            lambda run, lower=lower: rounded(expected(run, stages), lower),  # type: ignore[misc]
        )
        yield Alternative(
            "double-rounding",
            f"the base was rounded to {name} before the merge",
            lambda run, lower=lower: _from_rounded(run, stages, lower),  # type: ignore[misc]
        )
    if target in (F32, F64):
        return
    yield Alternative(
        "double-rounding",
        f"the adapter was rounded to {cli_name(name_of(target))} before the merge",
        lambda run: expected(run, [_rounded_block(stage, target) for stage in stages]),
    )
    if len(stages) > 1:
        yield Alternative(
            "double-rounding",
            f"was rounded to {cli_name(name_of(target))} between the adapters",
            lambda run: _rounded_between(run, stages, target),
        )


def _from_rounded(run: Run, stages: Sequence[Stage], lower: np.dtype[Any]) -> Array:
    return apply(rounded(run.base.astype(np.float64), lower), _cut_all(run, stages))


def _rounded_block(stage: Stage, target: np.dtype[Any]) -> Stage:
    return replace(stage, block=rounded(stage.block.astype(np.float64), target))


def _rounded_between(run: Run, stages: Sequence[Stage], target: np.dtype[Any]) -> Array:
    values = run.base.astype(np.float64)
    for stage in _cut_all(run, stages):
        values = rounded(apply(values, [stage]), target)
    return values


def _truncated(stages: Sequence[Stage], shape: tuple[int, int]) -> Iterator[Alternative]:
    """A block of which only the first k rows, or columns, were used."""
    for number, stage in enumerate(stages):
        r = rank_of(stage)
        for k in _ranks_below(r):
            for other in _shorter(stage, k):
                if not _fits(other, shape):
                    continue
                text = f"the rank was cut from {r} to {k}"
                changed = [*stages[:number], other, *stages[number + 1 :]]
                yield _by_stages("truncated-rank", text, changed)


def _ranks_below(r: int) -> list[int]:
    if r <= 16:
        return list(range(r - 1, 0, -1))
    powers = [1 << n for n in range(r.bit_length()) if 1 << n < r]
    return sorted({*powers, r - 1, r // 2, r * 3 // 4, r // 4}, reverse=True)


def _shorter(stage: Stage, k: int) -> Iterator[Stage]:
    block = stage.block
    if not is_bat(stage):
        kept: Array = np.array(block)
        kept[k:] = 0
        yield replace(stage, block=kept)
        yield replace(stage, block=np.asarray(block[:k]))
        return
    for rows, columns in ((k, None), (None, k), (k, k)):
        kept = np.array(block)
        if rows is not None:
            kept[:, rows:] = 0
        if columns is not None:
            kept[:, :, columns:] = 0
        yield replace(stage, block=kept)
