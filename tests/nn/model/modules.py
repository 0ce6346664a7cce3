"""Small models for the tests of BoneModel, and blocks that do something."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from boneconv.config import BoneConfig
from boneconv.nn.model.bone_model import BoneModel


class MLP(nn.Module):
    """Two linear layers, 12 -> 24 -> 6, with a normalisation that has a bias of its own."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 24, bias=bias)
        self.norm = nn.LayerNorm(24)
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(24, 6, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.lin0.weight.dtype)
        return self.lin1(self.drop(torch.relu(self.norm(self.lin0(x)))))


class Deep(nn.Module):
    """An embedding, three blocks of layers, a 1x1 and a 3x3 convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in range(3)
        )
        self.mix = nn.Conv2d(8, 4, 1)
        self.smooth = nn.Conv2d(4, 4, 3, padding=1)
        self.lm_head = nn.Linear(4, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        image = x.transpose(-1, -2)[..., None]
        image = self.smooth(self.mix(image))
        return self.lm_head(image[..., 0].transpose(-1, -2))


def make(kind: type[nn.Module] = MLP, seed: int = 0, **options: Any) -> nn.Module:
    """A model in eval mode with the same random weights every time."""
    torch.manual_seed(seed)
    return kind(**options).eval()


def batch(seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Five inputs of an MLP."""
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ids() -> torch.Tensor:
    """Two rows of seven tokens."""
    return torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(3))


def belongs(parameter: str, adapter: str) -> bool:
    """Whether a parameter is an adapter's, by its name."""
    ends = parameter.endswith(f".bone_block.{adapter}")
    return ends or f".modules_to_save.{adapter}." in parameter


def stir(model: BoneModel, adapter: str = "default", scale: float = 0.3, seed: int = 7) -> None:
    """Gives an adapter's blocks, copies and biases values that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_bias = parameter.requires_grad and "bias" in name and "modules_to_save" not in name
        if belongs(name, adapter) or is_bias:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data += noise.to(parameter.dtype)


def bone(config: BoneConfig | None = None, adapter: str = "default", **options: Any) -> BoneModel:
    """An MLP with one adapter that does something."""
    config = config or BoneConfig(**{"r": 4, "target_modules": ["lin0", "lin1"]} | options)
    model = BoneModel(make(), config, adapter)
    stir(model, adapter)
    return model


def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's values in float64."""
    return tensor.detach().double().numpy()
