"""Layers with random adapters, and the plain formula that they are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boneconv.config import Axis, Variant
from boneconv.kernels import Stage, reference
from boneconv.nn import BoneLinear

#: A kind of adapter -> its variant and axis.
KINDS = {
    "bone": (Variant.BONE, Axis.OUT),
    "mini": (Variant.MINI, Axis.OUT),
    "bat": (Variant.BAT, Axis.OUT),
    "bat in": (Variant.BAT, Axis.IN),
}


def add(layer: BoneLinear, name: str, kind: str, r: int = 4, **options: Any) -> None:
    """Add an adapter with a block of random numbers."""
    variant, axis = KINDS[kind]
    layer.add_adapter(name, r=r, variant=variant, axis=axis, mini_r=4, **options)
    with torch.no_grad():
        layer.bone_block[name].normal_(std=0.3)


def adapted(
    *kinds: str,
    out: int = 16,
    width: int = 24,
    r: int = 4,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    seed: int = 0,
) -> BoneLinear:
    """A layer with one active adapter per kind, named a0, a1, ..."""
    torch.manual_seed(seed)
    layer = BoneLinear(nn.Linear(width, out, bias=bias, dtype=dtype))
    for i, kind in enumerate(kinds):
        add(layer, f"a{i}", kind, r)
    layer.set_adapter([f"a{i}" for i in range(len(kinds))])
    return layer


def plain_weight(layer: BoneLinear, names: tuple[str, ...] | None = None) -> Tensor:
    """W'' by the definition: tile by tile, differentiable, in the widest dtype."""
    weight = layer.weight.flatten(1)
    for update in layer.updates(names):
        block = update.block.to(weight.dtype)
        r = update.rank
        if update.is_bat:
            rows = []
            for a, row in enumerate(weight.split(r, 0)):
                tiles = row.split(r, 1)
                chosen = [
                    block[a] if update.axis is Axis.OUT else block[b] for b in range(len(tiles))
                ]
                rows.append(
                    torch.cat([t + t @ c + c for t, c in zip(tiles, chosen, strict=True)], 1)
                )
            weight = torch.cat(rows, 0)
        else:
            columns = torch.arange(weight.shape[1]) % r
            rows_of = torch.arange(weight.shape[0]) % block.shape[1]
            weight = weight + block[columns][:, rows_of].t()
    return weight


def plain_forward(layer: BoneLinear, x: Tensor) -> Tensor:
    """The layer by the definition of its weight."""
    return F.linear(x, plain_weight(layer), layer.bias)


def reference_weight(layer: BoneLinear) -> np.ndarray[Any, np.dtype[np.float64]]:
    """W'' by the reference formulas of the kernels, which know no torch."""
    stages = [Stage(u.variant, u.block.detach().double().numpy(), u.axis) for u in layer.updates()]
    return reference.apply(layer.weight.detach().flatten(1).double().numpy(), stages)
