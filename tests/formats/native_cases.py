"""Native adapters for tests: some by hand, and a hypothesis strategy for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from boneconv.config import Axis, Variant
from boneconv.digest import LeafHasher, tensor_digest
from boneconv.formats.native import Metadata, Module, NativeAdapter
from boneconv.formats.native.metadata import root_of
from boneconv.formats.native.tensors import PREFIX
from boneconv.io.safetensors import ArrayTensor, byte_view
from tests.builders import BF16, F16, F32, NAMES, Array, grid

BLOCK_DTYPES = (F32, F16, BF16)
#: Names on which PEFT's matching by parts of names has something to stumble over.
WORDS = ("q", "k_q", "layers.0.q", "layers.1.q", "bone_q", "neck.bone_proj", "head", "head.q", "m")
HEADS = ("head", "score", "classifier", "q", "backbone_norm", "lm_head", "mod")


@dataclass(frozen=True)
class Case:
    """An adapter and the weights ``[out, in]`` of the base that it fits."""

    native: NativeAdapter
    weights: Mapping[str, Array]


def tensors_of(arrays: Mapping[str, Array]) -> dict[str, ArrayTensor]:
    """Arrays under the names that the file has."""
    return {PREFIX + name: ArrayTensor(PREFIX + name, array) for name, array in arrays.items()}


def block_shape(
    variant: Variant, axis: Axis | None, rank: int, mini: int | None, weight: tuple[int, int]
) -> tuple[int, ...]:
    out, inside = weight
    if variant is Variant.BAT:
        return ((out if axis is Axis.OUT else inside) // rank, rank, rank)
    return (rank, mini or out)


def digest(array: Array) -> str:
    hasher = LeafHasher()
    hasher.update(byte_view(np.ascontiguousarray(array)))
    return tensor_digest(NAMES[array.dtype], array.shape, hasher.leaves())


def small(variant: Variant = Variant.BONE, *, marked: bool = False, **fields: Any) -> Case:
    """Two modules of rank 2 on weights ``[4, 6]``, and what else the metadata's fields say."""
    axis = Axis.OUT if variant is Variant.BAT else None
    mini = 2 if variant is Variant.MINI else None
    weights = {name: grid((4, 6), F32, seed) for seed, name in enumerate(("layers.0.q", "k"))}
    modules = {
        name: Module(
            2,
            mini,
            base_shape=weight.shape if marked else None,
            base_dtype="F32" if marked else None,
            base_digest=digest(weight) if marked else None,
        )
        for name, weight in weights.items()
    }
    shape = block_shape(variant, axis, 2, mini, (4, 6))
    arrays = {f"{name}.bone_block": grid(shape, F32, 7) for name in modules}
    mark = root_of(modules) if marked else None
    metadata = Metadata(variant, modules, axis=axis, fingerprint=mark, **fields)
    saved = {name: grid((3, 4), F32, 9) for name in metadata.replaced_names}
    return Case(NativeAdapter(metadata, tensors_of({**arrays, **saved})), weights)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any native adapter: every variant, dtype, axis, ragged ranks, extras, awkward names.

    Half of them have nothing that PEFT cannot say, but for names. No adapted module lies in
    another: a linear layer holds none.
    """
    plain = draw(st.booleans())
    variant = draw(st.sampled_from([Variant.BONE, Variant.BAT] if plain else list(Variant)))
    axis = draw(st.sampled_from([Axis.OUT] if plain else list(Axis)))
    names = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3, unique=True))
    names = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    one_rank = plain or draw(st.booleans())
    rank = draw(st.integers(1, 4))
    says_shape, marked = draw(st.booleans()), draw(st.booleans())
    arrays: dict[str, Array] = {}
    modules, weights = {}, {}
    for seed, name in enumerate(names):
        r = rank if one_rank else draw(st.integers(1, 4))
        mini = draw(st.integers(1, 3)) if variant is Variant.MINI else None
        unit = (r, r) if variant is Variant.BAT else (mini or 1, 1)
        out = unit[0] * draw(st.integers(1, 3))
        inside = unit[1] * draw(st.integers(1, 3 if variant is Variant.BAT else 7))
        weights[name] = grid((out, inside), F32, seed)
        has_bias = not plain and draw(st.integers(0, 5)) == 0
        known = says_shape or marked or has_bias
        modules[name] = Module(
            r,
            mini,
            bias=has_bias or None,
            base_shape=(out, inside) if known else None,
            base_dtype="F32" if marked else None,
            base_digest=digest(weights[name]) if marked else None,
        )
        shape = block_shape(variant, axis, r, mini, (out, inside))
        arrays[f"{name}.bone_block"] = grid(shape, draw(st.sampled_from(BLOCK_DTYPES)), seed)
        if has_bias:
            arrays[f"{name}.bias"] = grid((out,), F32, seed)
    taken = set(names)
    heads = draw(st.lists(st.sampled_from(HEADS), max_size=2, unique=True))
    replaced = {head: ("weight",) for head in heads if head not in taken}
    arrays |= {f"{head}.weight": grid((3, 4), BF16) for head in replaced}
    metadata = Metadata(
        variant,
        modules,
        axis=axis if variant is Variant.BAT else None,
        scale=draw(st.sampled_from([None, 1] if plain else [None, 1, 0.5, -2, 0.1])),
        replaced=replaced or None,
        added=draw(st.sampled_from([None, tuple(replaced)])) or None,
        vocab_size=draw(st.sampled_from([None, 3])) if replaced else None,
        fingerprint=root_of(modules) if marked else None,
        info=draw(st.sampled_from([None, {"producer": "tests", "training": {"lr": 0.25}}])),
        unknown=draw(st.sampled_from([{}, {"x-note": ["ünïcode", None, 3]}])),
    )
    free = {"task_type": draw(st.sampled_from([None, "CAUSAL_LM", "SEQ_CLS"]))}
    return Case(NativeAdapter(metadata, tensors_of(arrays), free), weights)
