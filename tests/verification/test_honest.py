"""Honest merges pass: random shapes, dtypes, variants, strengths and numbers of adapters."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import boneconv
from boneconv.config import Axis, Variant
from boneconv.errors import NonFiniteError
from boneconv.kernels import RowMerger, Scratch, Stage
from boneconv.verification import verify
from tests.builders import BF16, F16, F32, F64, Array, make_adapter, pack
from tests.verification import models

VARIANTS = {"bone": Variant.BONE, "bat": Variant.BAT, "mini": Variant.MINI}
NAME = "linear.weight"


@dataclass(frozen=True)
class Merge:
    """A weight, its adapters, and how the merge is computed."""

    weight: Array
    stages: tuple[tuple[str, Array], ...]
    scale: float
    how: str
    target: Any


@st.composite
def merges(draw: st.DrawFn) -> Merge:
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    dtype = draw(st.sampled_from((BF16, F16, F32)))
    target = draw(st.sampled_from((dtype, BF16, F16, F32)))
    size = 2.0 ** draw(st.integers(-14, 3))
    r = draw(st.sampled_from((1, 2, 3, 4, 8, 40)))
    out, columns = r * draw(st.integers(1, 6)), r * draw(st.integers(1, 6))
    variants = draw(st.lists(st.sampled_from(tuple(VARIANTS)), min_size=1, max_size=3))
    if "bat" not in variants:
        columns += draw(st.integers(0, 3))
    weight = models.values(rng, (out, columns), size, dtype)
    stages = []
    for variant in variants:
        own = 2.0 ** draw(st.integers(-6, 0)) / (r if variant == "bat" else 1)
        shape = {"bat": (out // r, r, r), "bone": (r, out), "mini": (r, r)}[variant]
        scale = own if variant == "bat" else own * size
        block = models.values(rng, shape, scale, draw(st.sampled_from((F32, BF16, F16))))
        stages.append((variant, block))
    scale = draw(st.sampled_from((1.0, 1.0, 0.5, 0.3, -0.7)))
    how = draw(st.sampled_from(("canonical", "plain", "float32", "sums", "difference")))
    return Merge(weight, tuple(stages), scale, how, target)


def computed(merge: Merge) -> Array:
    """The merge as its way computes it, rounded once to the target."""
    target = np.dtype(merge.target)
    if merge.how in ("canonical", "plain"):
        stages = [Stage(VARIANTS[v], b, Axis.OUT, merge.scale) for v, b in merge.stages]
        shape = (merge.weight.shape[0], merge.weight.shape[1])
        canonical = merge.how == "canonical"
        merger = RowMerger(stages, shape, merge.weight.dtype, target, canonical=canonical)
        out: Array = np.empty(merge.weight.shape, target)
        merger.merge(merge.weight, 0, out, Scratch())
        return out
    weight = merge.weight.astype(F32)
    scale = np.float32(merge.scale)
    for variant, block in merge.stages:
        wide = block.astype(F32)
        update = in_order(weight, wide) if (merge.how, variant) == ("sums", "bat") else None
        update = models.delta(weight, wide, variant) if update is None else update
        if merge.how == "difference":
            whole = (weight + update).astype(F32)
            weight = (weight + scale * (whole - weight)).astype(F32)
        else:
            weight = (weight + scale * update).astype(F32)
    with np.errstate(all="ignore"):
        return weight.astype(target)


def in_order(weight: Array, block: Array) -> Array:
    """BAT's update with its sums taken one product at a time, from the block's own element."""
    rows, columns = weight.shape
    r = block.shape[-1]
    update = np.empty_like(weight)
    for row in range(rows):
        for tile in range(columns // r):
            part = block[row // r, row % r].copy()
            for k in range(r):
                part = part + weight[row, tile * r + k] * block[row // r, k]
            update[row, tile * r : tile * r + r] = part
    return update


@settings(max_examples=200)
@given(merges())
def test_no_honest_merge_is_refused(merge: Merge) -> None:
    try:
        found = computed(merge)
    except NonFiniteError:
        return
    if not np.isfinite(found.astype(F64)).all():
        return
    with tempfile.TemporaryDirectory() as folder:
        report = check(Path(folder), merge, found)
    assert report.passed, [tensor.reason for tensor in report.failures]
    if merge.how == "canonical":
        assert report.totals.identical == report.totals.tensors


def check(root: Path, merge: Merge, found: Array) -> boneconv.verification.Report:
    base = root / "base.safetensors"
    base.write_bytes(pack({NAME: merge.weight, "other": merge.weight[0].copy()}))
    candidate = root / "candidate.safetensors"
    with np.errstate(all="ignore"):
        other = merge.weight[0].astype(merge.target)
    candidate.write_bytes(pack({NAME: found, "other": other}))
    adapters = []
    for number, (variant, block) in enumerate(merge.stages):
        fields: dict[str, Any] = {"target_modules": ["linear"]}
        if variant == "mini":
            fields["mini_r"] = block.shape[1]
        place = root / f"adapter{number}"
        rank = block.shape[-1] if variant == "bat" else block.shape[0]
        make_adapter(place, variant, rank=rank, blocks={"linear": block}, **fields)
        adapters.append(place)
    return verify(base, adapters[0], candidate, more=adapters[1:], scale=merge.scale, workers=1)


@settings(max_examples=60)
@given(merges(), st.integers(0, 2**16), st.sampled_from((-1, 1)))
def test_a_wrong_number_is_refused(merge: Merge, place: int, sign: int) -> None:
    """A canonical merge with one number off by 1 %, or by the whole weight where that is zero."""
    try:
        found = computed(merge)
    except NonFiniteError:
        return
    flat = found.reshape(-1)
    index = place % flat.size
    size = float(np.abs(found.astype(F64)).max())
    bound = sum(float(np.abs(b.astype(F64)).max()) for _, b in merge.stages) + size
    spoiled = float(flat[index]) + sign * 0.02 * bound
    with np.errstate(all="ignore"):
        flat[index] = np.asarray(spoiled).astype(merge.target)
    if not np.isfinite(flat.astype(F64)).all():
        return
    with tempfile.TemporaryDirectory() as folder:
        report = check(Path(folder), merge, found)
    assert not report.passed
