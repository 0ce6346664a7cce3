"""A linear layer with adapters: wrapping it and choosing among them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from boneconv.config import Variant
from boneconv.errors import ConfigError, ShapeError
from boneconv.nn import BoneLinear
from tests.nn.layers import KINDS, adapted, plain_forward

ALL = list(KINDS)


# Wrapping


@pytest.mark.parametrize(
    "base",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1, stride=2),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.ConvTranspose2d(4, 4, 1),
        nn.Conv1d(4, 4, 1),
        nn.Embedding(4, 4),
        nn.Identity(),
    ],
    ids=str,
)
def test_other_layers_are_refused(base: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"no linear layer|cannot be adapted"):
        BoneLinear(base)


def test_transformers_conv1d_is_refused() -> None:
    from transformers.pytorch_utils import Conv1D

    with pytest.raises(ConfigError, match="found Conv1D"):
        BoneLinear(Conv1D(4, 4))


def test_the_base_is_frozen_and_kept_as_it_is() -> None:
    base = nn.Linear(24, 16)
    weight = base.weight
    layer = BoneLinear(base)
    assert layer.base_layer is base
    assert layer.weight is weight
    assert not any(p.requires_grad for p in base.parameters())


def test_state_dict_keys_are_pefts() -> None:
    layer = adapted("bone", "bat")
    layer.cache_weight = True
    keys = ["base_layer.weight", "base_layer.bias", "bone_block.a0", "bone_block.a1"]
    assert list(layer.state_dict()) == keys
    layer.merge()
    assert list(layer.state_dict()) == keys
    assert [name for name, _ in layer.named_parameters()] == keys


@pytest.mark.parametrize("kind", ALL)
def test_a_new_adapter_changes_nothing(kind: str) -> None:
    layer = adapted()
    variant, axis = KINDS[kind]
    layer.add_adapter("n", r=4, variant=variant, axis=axis, mini_r=4)
    layer.set_adapter("n")
    block = layer.bone_block["n"]
    assert not block.any()
    assert block.requires_grad
    assert block.dtype == torch.float64
    x = torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", ALL)
def test_random_blocks_are_pefts(kind: str) -> None:
    layer = adapted()
    variant, axis = KINDS[kind]
    torch.manual_seed(7)
    layer.add_adapter("n", r=4, variant=variant, axis=axis, mini_r=4, init_weights=False)
    torch.manual_seed(7)
    expected = torch.zeros_like(layer.bone_block["n"])
    nn.init.kaiming_uniform_(expected, a=math.sqrt(5))
    assert torch.equal(layer.bone_block["n"], expected)


def test_a_block_takes_a_device_and_a_dtype() -> None:
    layer = adapted(dtype=torch.bfloat16)
    layer.add_adapter("m", r=4, device="meta", dtype=torch.float32)
    assert layer.bone_block["m"].device.type == "meta"
    assert layer.bone_block["m"].dtype == torch.float32
    layer.add_adapter("n", r=4)
    assert layer.bone_block["n"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["", "a.b", "a0", "keys"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match="no name for a new adapter"):
        adapted("bone").add_adapter(name, r=4)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"r": 0}, ConfigError),
        ({"r": 4, "dropout": 1.0}, ConfigError),
        ({"r": 4, "dropout": -0.1}, ConfigError),
        ({"r": 5, "variant": Variant.BAT}, ShapeError),
        ({"r": 16, "variant": Variant.BAT}, ShapeError),
        ({"r": 4, "variant": Variant.MINI, "mini_r": 3}, ShapeError),
    ],
    ids=str,
)
def test_options_that_cannot_be(options: dict[str, Any], error: type[Exception]) -> None:
    layer = adapted()
    with pytest.raises(error):
        layer.add_adapter("n", **options)
    assert not layer.bone_block
    assert issubclass(error, ValueError)


# Choosing adapters


def test_active_adapters_are_applied_in_their_order() -> None:
    layer = adapted("bone", "bat", "bat in")
    x = torch.randn(5, 24, dtype=torch.float64)
    seen = []
    for names in (["a0", "a1"], ["a1", "a0"], ["a2", "a0", "a1"], "a1", []):
        layer.set_adapter(names)
        assert layer.active_adapters == ((names,) if isinstance(names, str) else tuple(names))
        y = layer(x)
        torch.testing.assert_close(y, plain_forward(layer, x))
        assert not any(torch.allclose(y, other) for other in seen)
        seen.append(y)


def test_adapters_of_other_layers_may_be_active() -> None:
    layer = adapted("bone")
    x = torch.randn(5, 24, dtype=torch.float64)
    y = layer(x)
    layer.set_adapter(["elsewhere", "a0"])
    assert torch.equal(layer(x), y)
    layer.set_adapter("elsewhere")
    assert torch.equal(layer(x), layer.base_layer(x))


def test_no_adapter_twice() -> None:
    with pytest.raises(ConfigError, match="named twice"):
        adapted("bone").set_adapter(["a0", "a0"])


def test_disable_and_enable() -> None:
    layer = adapted("bone", "bat")
    x = torch.randn(5, 24, dtype=torch.float64)
    y = layer(x)
    layer.disable_adapters()
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters()
    assert torch.equal(layer(x), y)


def test_delete() -> None:
    layer = adapted("bone", "bat")
    layer.delete_adapter("a0")
    assert list(layer.bone_block) == ["a1"]
    assert layer.active_adapters == ("a1",)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain_forward(layer, x))
    with pytest.raises(ConfigError, match=r"no such adapter.*expected a1, found a0"):
        layer.delete_adapter("a0")
