"""What the kernels' tests draw: weights, blocks and stages of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from boneconv.config import Axis, Variant
from boneconv.dtypes import BF16, F16, F32, F64
from boneconv.kernels import RowMerger, Scratch, Stage

DTYPES = [BF16, F16, F32, F64]
#: A variant and an axis for each formula.
FORMULAS = [
    (Variant.BONE, Axis.OUT),
    (Variant.MINI, Axis.OUT),
    (Variant.BAT, Axis.OUT),
    (Variant.BAT, Axis.IN),
]
ROUNDINGS = [
    (BF16, BF16, F32),
    (BF16, BF16, BF16),
    (F16, F16, F32),
    (F16, F16, F16),
    (F16, BF16, F32),
    (F32, F32, F32),
    (F32, BF16, BF16),
    (F32, F16, F32),
]
#: What the values look like; the names are explained in `values`.
KINDS = ["normal", "few bits", "tiny", "subnormal", "huge", "mixed", "zero"]


def values(kind: str, shape: tuple[int, ...], dtype: np.dtype[Any], rng: Any) -> Any:
    """Random values of a kind: powers of two make ties, subnormals and huge ones the edges."""
    size = int(np.prod(shape))
    info = {BF16: (-126, 127), F16: (-14, 15), F32: (-126, 127), F64: (-1022, 1023)}[dtype]
    normal = rng.standard_normal(size)
    if kind == "few bits":
        drawn = rng.integers(-3, 4, size) * 2.0 ** rng.integers(-9, 1, size)
    elif kind == "tiny":
        drawn = normal * 2.0 ** (info[0] // 2)
    elif kind == "subnormal":
        drawn = normal * 2.0 ** (info[0] - 3)
    elif kind == "huge":
        drawn = normal * 2.0 ** (info[1] - 3)
    elif kind == "mixed":
        drawn = normal * 2.0 ** rng.integers(-12, 3, size)
    elif kind == "zero":
        drawn = normal * 0.0  # of both signs
    else:
        drawn = normal * 0.02
    drawn[rng.random(size) < 0.1] = -0.0
    with np.errstate(all="ignore"):
        result = drawn.astype(dtype).reshape(shape)
    result[~np.isfinite(result)] = 1
    return result


def stage_of(variant: Variant, axis: Axis, shape: tuple[int, int], r: int, **options: Any) -> Stage:
    """A stage with a random block that fits."""
    rng, kind, dtype = options["rng"], options.get("kind", "normal"), options.get("dtype", F32)
    out, columns = shape
    if variant is Variant.BAT:
        block_shape: tuple[int, ...] = ((out if axis is Axis.OUT else columns) // r, r, r)
    else:
        block_shape = (r, out if variant is Variant.BONE else max(1, out // 2))
    block = values(kind, block_shape, dtype, rng)
    return Stage(variant, block, axis, options.get("scale", 1.0))


@st.composite
def merges(draw: st.DrawFn, stages: int = 3) -> tuple[Any, list[Stage], np.dtype[Any]]:
    """A weight, stages that fit it, and a target dtype."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    r = draw(st.integers(1, 5))
    out, columns = 2 * r * draw(st.integers(1, 2)), r * draw(st.integers(1, 4))
    count = draw(st.sampled_from([1, 1, *range(1, stages + 1)]))
    variants = draw(st.lists(st.sampled_from(list(Variant)), min_size=count, max_size=count))
    if Variant.BAT not in variants:
        columns += draw(st.integers(0, 2))  # Bone's last slice may be ragged
    source, target = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    drawn = [
        stage_of(
            variant,
            draw(st.sampled_from(list(Axis))),
            (out, columns),
            r,
            rng=rng,
            kind=draw(st.sampled_from(KINDS)),
            dtype=draw(st.sampled_from(DTYPES)),
            scale=draw(st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.3, -1.7, 0.0])),
        )
        for variant in variants
    ]
    weight = values(draw(st.sampled_from(KINDS)), (out, columns), source, rng)
    return weight, drawn, target


def bits(array: Any) -> Any:
    """The array's bytes as unsigned integers, so that -0 and +0 differ."""
    return array.view(f"u{array.dtype.itemsize}")


def merged(merger: RowMerger, weight: Any, target: np.dtype[Any], rows: int | None = None) -> Any:
    """The whole weight, merged in chunks of some rows (all of them by default)."""
    out = np.full(weight.shape, 7, target)
    scratch = Scratch()
    step = rows or len(weight)
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        merger.merge(weight[part], start, out[part], scratch)
    return out


def adversarial() -> list[tuple[str, Any, Any]]:
    """Names, weights and blocks that ask for trouble."""
    rng = np.random.default_rng(10)
    shape, r = (16, 64), 16
    normal = rng.standard_normal(shape) * 0.02
    powers = 2.0 ** rng.integers(-8, 0, shape) * rng.choice([-1, 1], shape)
    block = rng.standard_normal((1, r, r)) * 0.01
    block_powers = 2.0 ** rng.integers(-8, -3, (1, r, r)) * rng.choice([-1, 1], (1, r, r))
    midpoints = 1 + 2.0**-8 + np.zeros(shape)
    return [
        ("a block of zeros", normal, block * 0),
        ("a tiny block decides ties", midpoints, block * 1e-30),
        ("powers of two tie", powers, block_powers),
        ("a sparse block", powers, block_powers * (rng.random((1, r, r)) < 0.05)),
        ("a weight of zeros", normal * 0, block),
        ("an outlier", np.where(rng.random(shape) < 0.01, 100, normal), block),
        ("cancellation", np.ones(shape), np.tile(-np.eye(r), (1, 1, 1))),
        ("minus zero", -np.zeros(shape), -np.zeros((1, r, r))),
    ]
