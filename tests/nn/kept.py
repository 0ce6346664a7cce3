"""Layers that keep W', and whether they keep the right one."""

from __future__ import annotations

import torch
from torch import Tensor

from boneconv.nn import BoneLinear
from tests.nn.layers import adapted, plain_forward


def kept_layer(*kinds: str, dtype: torch.dtype = torch.float64) -> BoneLinear:
    layer = adapted(*(kinds or ("bat",)), dtype=dtype).eval()
    layer.cache_weight = True
    return layer


def tokens(layer: BoneLinear) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(3, 24).to(layer.weight.dtype)


def agrees(layer: BoneLinear) -> bool:
    """Whether what the layer gives now is what its tensors say now."""
    x = tokens(layer)
    with torch.no_grad():
        return torch.allclose(layer(x), plain_forward(layer, x))


def kept(layer: BoneLinear) -> Tensor | None:
    return layer._cache.kept
