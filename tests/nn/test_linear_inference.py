"""Without gradients a lone Bone adapter goes a shorter way, which gives what the long one gives."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boneconv.errors import ShapeError
from boneconv.nn import BoneLinear, linear
from tests.nn.layers import adapted, add, plain_forward


def _taken(layer: BoneLinear, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the short way was taken; what comes out is held to the plain formula."""
    ways: list[Tensor | None] = []

    def spied(*arguments: Tensor) -> Tensor | None:
        ways.append(short(*arguments))
        return ways[-1]

    short = linear.bone_at_once
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(linear, "bone_at_once", spied)
        torch.testing.assert_close(layer(x), plain_forward(layer, x))
    return any(way is not None for way in ways)


def _second_adapter(layer: BoneLinear) -> None:
    add(layer, "b", "bone")
    layer.set_adapter(["a0", "b"])


def _bat_instead(layer: BoneLinear) -> None:
    add(layer, "b", "bat")
    layer.set_adapter("b")


def _kept(layer: BoneLinear) -> None:
    layer.eval()
    layer.cache_weight = True


def _narrow_block(layer: BoneLinear) -> None:
    layer.bone_block["a0"] = nn.Parameter(layer.bone_block["a0"].float())


@pytest.mark.parametrize(
    "change",
    [
        _second_adapter,
        _bat_instead,
        _kept,
        _narrow_block,
        lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
    ],
)
def test_the_long_way(
    change: Callable[[BoneLinear], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = adapted("bone"), torch.randn(3, 24, dtype=torch.float64)
    assert _taken(layer, x, monkeypatch)
    change(layer)
    assert not _taken(layer, x, monkeypatch)


def test_a_merged_adapter_is_not_applied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = adapted("bone"), torch.randn(3, 24, dtype=torch.float64)
    layer.merge()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.unmerge()
    assert _taken(layer, x, monkeypatch)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [4, 7])
def test_the_short_way(r: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapted("bone", r=r, bias=bias)
    for shape in [(3, 24), (24,), (2, 3, 24), (0, 24), (2, 0, 24)]:
        assert _taken(layer, torch.randn(shape, dtype=torch.float64), monkeypatch)


def test_another_adapter_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = adapted("bone"), torch.randn(3, 24, dtype=torch.float64)
    add(layer, "b", "bone", r=3)
    for names in ("b", ["elsewhere", "a0"], "b"):
        layer.set_adapter(names)
        assert _taken(layer, x, monkeypatch)
    layer.delete_adapter("b")
    add(layer, "b", "bat")
    layer.set_adapter("b")
    assert not _taken(layer, x, monkeypatch)


def test_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = adapted("bone"), torch.randn(3, 24, dtype=torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # of our own making
        assert _taken(other, x, monkeypatch)


def test_disabled_adapters_are_not_applied() -> None:
    layer, x = adapted("bone"), torch.randn(3, 24, dtype=torch.float64)
    layer.disable_adapters()
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base_layer(x))


def test_dropout_of_a_pass_without_gradients() -> None:
    layer = BoneLinear(nn.Linear(24, 16))
    add(layer, "a0", "bone", dropout=0.5)
    layer.set_adapter("a0")
    x = torch.randn(3, 24)
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def test_autocast() -> None:
    layer = adapted("bone", dtype=torch.float32)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with torch.no_grad():
            y = layer(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


def test_the_wrong_width() -> None:
    with torch.no_grad(), pytest.raises(ShapeError, match="does not fit the weight"):
        adapted("bone")(torch.randn(3, 23, dtype=torch.float64))
