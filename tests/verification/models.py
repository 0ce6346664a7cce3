"""Small models with random values, merged here by the formulas; no code under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.builders import (
    BF16,
    F32,
    F64,
    Array,
    make_adapter,
    make_base,
    pack,
    unpack_folder,
)

HIDDEN, INNER, VOCABULARY, RANK, LAYERS = 32, 64, 48, 8, 3
Q, UP, DOWN = "self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"
SHAPES = {Q: (HIDDEN, HIDDEN), UP: (INNER, HIDDEN), DOWN: (HIDDEN, INNER)}


def weight_name(layer: int, module: str) -> str:
    return f"model.layers.{layer}.{module}.weight"


def values(rng: np.random.Generator, shape: tuple[int, ...], scale: float, dtype: Any) -> Array:
    return np.asarray((rng.standard_normal(shape) * scale).astype(np.float32).astype(dtype))


def base_tensors(dtype: Any = BF16, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": values(rng, (VOCABULARY, HIDDEN), 0.05, dtype)}
    for layer in range(LAYERS):
        for module, shape in SHAPES.items():
            tensors[weight_name(layer, module)] = values(rng, shape, 0.05, dtype)
        tensors[f"model.layers.{layer}.norm.weight"] = values(rng, (HIDDEN,), 1.0, dtype)
    tensors["model.norm.weight"] = values(rng, (HIDDEN,), 1.0, dtype)
    tensors["model.position_ids"] = np.arange(6, dtype=np.int64)
    return tensors


def block_shape(variant: str, shape: tuple[int, int]) -> tuple[int, ...]:
    if variant == "bat":
        return shape[0] // RANK, RANK, RANK
    return (RANK, shape[0]) if variant == "bone" else (RANK, 4)


def adapter_blocks(variant: str, dtype: Any = F32, seed: int = 1) -> dict[str, Array]:
    rng = np.random.default_rng([seed, 77])
    return {
        f"model.layers.{layer}.{module}": values(rng, block_shape(variant, shape), 0.04, dtype)
        for layer in range(LAYERS)
        for module, shape in SHAPES.items()
    }


def bat_delta(weight: Array, block: Array, axis: str = "out") -> Array:
    r = block.shape[-1]
    rows, columns = weight.shape
    tiles = weight.reshape(rows // r, r, columns // r, r).transpose(0, 2, 1, 3)
    blocks = block[:, None] if axis == "out" else block[None, :]
    change = tiles @ blocks + blocks
    return np.asarray(change.transpose(0, 2, 1, 3).reshape(rows, columns))


def delta(weight: Array, block: Array, variant: str) -> Array:
    """W' - W in the dtype of the arguments."""
    if variant == "bat":
        return bat_delta(weight, block)
    rows, columns = weight.shape
    over_rows = block[:, np.arange(rows) % block.shape[1]]
    return np.asarray(over_rows[np.arange(columns) % block.shape[0]].T)


def merged(weight: Array, block: Array, variant: str, scale: float = 1.0) -> Array:
    """In float64."""
    wide = weight.astype(F64)
    return np.asarray(wide + scale * delta(wide, block.astype(F64), variant))


def to(array: Array, dtype: Any) -> Array:
    """Float64 rounded once (through odd float32 for bfloat16)."""
    if np.dtype(dtype) != BF16:
        return array.astype(dtype)
    single = array.astype(np.float32)
    bits = single.view(np.uint32)
    inexact = single.astype(F64) != array
    away = inexact & (np.abs(single.astype(F64)) > np.abs(array))
    odd = np.where(inexact, (bits - away.astype(np.uint32)) | np.uint32(1), bits)
    return np.asarray(odd.astype(np.uint32).view(np.float32).astype(BF16))


@dataclass
class Case:
    """A base, an adapter, and the honest merge, as arrays and on disk.

    `write` puts tensors, spoiled or not, where a candidate belongs.
    """

    root: Path
    variant: str
    dtype: Any
    base: Path
    adapter: Path
    weights: dict[str, Array]
    blocks: dict[str, Array]
    saved: dict[str, Array] = field(default_factory=dict)

    def merged(self, **options: Any) -> dict[str, Array]:
        """The correctly rounded merge."""
        return self.each(lambda w, b: to(merged(w, b, self.variant, **options), self.dtype))

    def each(self, merge: Callable[[Array, Array], Array]) -> dict[str, Array]:
        tensors = dict(self.weights)
        for module, block in self.blocks.items():
            name = f"{module}.weight"
            tensors[name] = merge(self.weights[name], block)
        return tensors | self.saved

    def write(self, tensors: Mapping[str, Array], *, shards: int = 2, **options: Any) -> Path:
        place = self.root / f"candidate{len(list(self.root.iterdir()))}"
        return make_base(place, tensors, shards=shards, **options)


def make_case(
    root: Path,
    variant: str = "bat",
    dtype: Any = BF16,
    *,
    saved: Mapping[str, Array] | None = None,
    seed: int = 0,
    **options: Any,
) -> Case:
    root.mkdir(parents=True, exist_ok=True)
    weights = base_tensors(dtype, seed)
    blocks = adapter_blocks(variant, seed=seed)
    base = make_base(root / "base", weights, shards=2, **options)
    own = {} if saved is None else dict(saved)
    fields = {"modules_to_save": sorted({n.split(".")[-2] for n in own})} if own else {}
    if variant == "mini":
        fields["mini_r"] = 4
    adapter = make_adapter(root / "adapter", variant, rank=RANK, blocks=blocks, saved=own, **fields)
    return Case(root, variant, dtype, base, adapter, weights, blocks, own)


def read(folder: Path) -> dict[str, Array]:
    return {name: tensor.copy() for name, tensor in unpack_folder(folder).items()}


def rewrite(file: Path, change: Callable[[dict[str, Array]], None]) -> None:
    """Changes the tensors of one weight file in place."""
    from tests.builders import unpack

    tensors = {name: tensor.copy() for name, tensor in unpack(file).items()}
    change(tensors)
    file.write_bytes(pack(tensors, {"format": "pt"}))


def edit_json(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | fields, indent=2))
