"""Merging the adapters of a layer, and back to every bit."""

from __future__ import annotations

import copy
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boneconv.config import Axis, Variant
from boneconv.errors import ConfigError, NonFiniteError
from boneconv.kernels import RowMerger, Scratch, Stage
from boneconv.nn import BoneLinear
from tests.nn.layers import KINDS, adapted, add, plain_weight

ALL = list(KINDS)
#: torch dtype -> numpy's, the integers that hold its bits, and numpy's of those.
DTYPES: dict[torch.dtype, tuple[Any, torch.dtype, Any]] = {
    torch.float64: (np.float64, torch.int64, np.int64),
    torch.float32: (np.float32, torch.int32, np.int32),
    torch.float16: (np.float16, torch.int16, np.int16),
    torch.bfloat16: (ml_dtypes.bfloat16, torch.int16, np.int16),
}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(DTYPES[tensor.dtype][1])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_a_merged_weight_is_the_canonical_one(kind: str, dtype: torch.dtype) -> None:
    layer = adapted(kind, dtype=torch.float32).to(dtype)
    merged = layer.merged_weight()
    assert merged.dtype == dtype
    numpy_dtype, _, integer = DTYPES[dtype]

    def array(tensor: Tensor) -> Any:
        return bits(tensor).numpy().view(numpy_dtype)

    (update,) = layer.updates()
    stage = Stage(update.variant, array(update.block), update.axis)
    merger = RowMerger([stage], (16, 24), np.dtype(numpy_dtype), np.dtype(numpy_dtype))
    expected = np.empty((16, 24), numpy_dtype)
    merger.merge(np.ascontiguousarray(array(layer.weight)), 0, expected, Scratch())
    assert np.array_equal(bits(merged).numpy(), expected.view(integer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_off_the_cpu_it_is_rounded_once_from_a_wider_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from boneconv.nn import weights

    layer = adapted("bone", "bat", out=64, width=96, dtype=torch.float32).to(dtype)
    exact = layer.merged_weight()
    monkeypatch.setattr(weights, "_canonical", lambda w, u: weights._rounded(w, u, finite=True))
    assert (bits(layer.merged_weight()) != bits(exact)).double().mean() < 0.003


def test_merging_no_adapter_or_several_names() -> None:
    layer = adapted("bone", "bat")
    layer.set_adapter([])
    layer.merge()
    assert layer.merged_adapters == ()
    layer.merge(names=["a1", "a0"])
    assert layer.merged_adapters == ("a1", "a0")
    expected = plain_weight_of_original(layer, ("a1", "a0"))
    torch.testing.assert_close(layer.weight, expected)
    with pytest.raises(ConfigError, match="no such adapter"):
        layer.merge(names=["elsewhere"])


def plain_weight_of_original(layer: BoneLinear, names: tuple[str, ...]) -> Tensor:
    other = copy.deepcopy(layer)
    other.unmerge()
    return nn.Parameter(plain_weight(other, names), requires_grad=False)


@pytest.mark.parametrize("kinds", [[kind] for kind in ALL] + [["bat", "bone", "bat in"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit_and_the_parameter(kinds: list[str], dtype: torch.dtype) -> None:
    layer = adapted(*kinds, dtype=torch.float32).to(dtype)
    weight = layer.weight
    before = weight.detach().clone()
    layer.merge(safe_merge=True)
    assert layer.merged_adapters == layer.active_adapters
    assert not torch.equal(layer.weight, before)
    assert torch.equal(weight, before)  # whoever shares the parameter sees no merge
    with torch.no_grad():
        layer.bone_block["a0"].fill_(3)  # the block is not needed to come back
    layer.unmerge()
    assert layer.weight is weight
    assert torch.equal(bits(layer.weight), bits(before))
    assert layer.merged_adapters == ()
    layer.unmerge()
    assert layer.weight is weight


def test_merging_one_after_another_rounds_once() -> None:
    layer = adapted("bat", "bone", dtype=torch.float32).bfloat16()
    at_once = layer.merged_weight()
    layer.merge(names="a0")
    layer.merge(names=["a0", "a1"])
    assert layer.merged_adapters == ("a0", "a1")
    assert torch.equal(bits(layer.weight), bits(at_once))


def test_a_merged_layer_computes_the_same_and_the_base_when_disabled() -> None:
    layer = adapted("bat", "mini")
    x = torch.randn(5, 24, dtype=torch.float64)
    y, base = layer(x), layer.base_layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y)
    layer.disable_adapters()
    assert torch.equal(layer(x), base)
    assert layer.merged_adapters == ("a0", "a1")


def test_a_merged_layer_can_be_moved_copied_and_cast() -> None:
    layer = adapted("bat", dtype=torch.float32)
    before = layer.weight.detach().clone()
    layer.merge()
    copied = copy.deepcopy(layer)
    copied.unmerge()
    assert torch.equal(copied.weight, before)
    layer.bfloat16()
    layer.unmerge()
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.weight, before.bfloat16())


def test_a_merged_adapter_cannot_be_deleted() -> None:
    layer = adapted("bone")
    layer.merge()
    with pytest.raises(ConfigError, match="Unmerge it first"):
        layer.delete_adapter("a0")
    layer.unmerge()
    layer.delete_adapter("a0")


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("where", ["block", "weight", "overflow"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_safe_merge_refuses_before_anything_changes(kind: str, where: str, value: float) -> None:
    layer = adapted(kind, width=28 if kind in ("bone", "mini") else 24, dtype=torch.float32)
    with torch.no_grad():
        if where == "overflow":
            layer.weight[3, 5] = 3.3e38
            layer.bone_block["a0"].fill_(3.3e38)
        else:
            p = layer.weight if where == "weight" else layer.bone_block["a0"]
            p.view(-1)[-1] = value
    weight, before = layer.weight, layer.weight.detach().clone()
    with pytest.raises(NonFiniteError) as caught:
        layer.merge(safe_merge=True)
    assert isinstance(caught.value, ValueError)
    assert layer.weight is weight
    assert torch.equal(bits(layer.weight), bits(before))
    assert layer.merged_adapters == ()
    layer.merge()  # without the check, as PEFT does
    assert not torch.isfinite(layer.weight).all()
    layer.unmerge()
    assert torch.equal(bits(layer.weight), bits(before))


class Quantized(nn.Linear):
    """A weight of another dtype and shape, which only its own forward understands."""

    def __init__(self) -> None:
        super().__init__(24, 16, bias=False)
        self.weight = nn.Parameter(torch.randint(-9, 9, (384, 1), dtype=torch.int8), False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.view(16, 24).float() / 9)


def test_a_quantized_weight_takes_bone_and_refuses_bat() -> None:
    layer = BoneLinear(Quantized())
    add(layer, "b", "bone", r=5)
    assert layer.bone_block["b"].dtype == torch.float32
    layer.set_adapter("b")
    x = torch.randn(3, 24)
    expected = layer.base_layer(x) + F.pad(x, (0, 1)).view(3, 5, 5).sum(1) @ layer.bone_block["b"]
    torch.testing.assert_close(layer(x), expected)
    for axis in Axis:
        with pytest.raises(ConfigError, match="quantized"):
            layer.add_adapter("m", r=4, variant=Variant.BAT, axis=axis)


def test_a_quantized_weight_is_not_merged() -> None:
    layer = adapted("bone", dtype=torch.float32)
    layer.base_layer.weight = nn.Parameter(torch.zeros(16, 24, dtype=torch.int8), False)
    with pytest.raises(ConfigError, match="cannot be merged"):
        layer.merge()
