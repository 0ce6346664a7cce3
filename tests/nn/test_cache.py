"""A kept W' is formed once, and never outlives what is done to its layer."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from boneconv.config import Variant
from boneconv.nn import BoneLinear, cache
from tests.nn.kept import agrees, kept, kept_layer, tokens
from tests.nn.layers import adapted, add, plain_forward
from tests.nn.writes import data_add, data_assigned, under_no_grad


def test_it_is_formed_once(layer: BoneLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kept(layer)
    monkeypatch.setattr(layer, "_form", pytest.fail)
    for _ in range(3):
        assert agrees(layer)
    assert kept(layer) is first


def test_off_by_default_and_nothing_kept() -> None:
    layer = adapted("bat").eval()
    assert not layer.cache_weight
    assert agrees(layer)
    assert kept(layer) is None


@pytest.mark.parametrize("kinds", [["bat"], ["bat in"], ["bone"], ["mini", "bat", "bone"]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_kind_can_be_kept(kinds: list[str], dtype: torch.dtype) -> None:
    layer = kept_layer(*kinds, dtype=dtype)
    x = tokens(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain_forward(layer, x))
        assert kept(layer) is not None
        torch.testing.assert_close(layer(x), plain_forward(layer, x))


def test_half_precision_keeps_a_weight_rounded_once() -> None:
    layer = kept_layer("bat", dtype=torch.float32).bfloat16().eval()
    with torch.no_grad():
        layer(tokens(layer))
    weight = kept(layer)
    assert weight is not None
    wrong = (weight != layer.merged_weight()).double().mean()
    assert wrong < 0.002  # float32 on the way, against the exact value


# What is done to the layer


def test_load_state_dict(layer: BoneLinear) -> None:
    state = {key: torch.randn_like(value) for key, value in layer.state_dict().items()}
    for assign in (False, True):
        layer.load_state_dict({k: v * 2 for k, v in state.items()}, assign=assign)
        assert agrees(layer)
        layer.load_state_dict(state, assign=assign)
        assert agrees(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts(layer: BoneLinear, dtype: torch.dtype) -> None:
    layer.to(dtype)
    x = tokens(layer)
    with torch.no_grad():
        y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, plain_forward(layer, x), rtol=0.03, atol=0.2)
    layer.double()
    assert agrees(layer)


def test_to_another_device(layer: BoneLinear) -> None:
    layer.to("meta")
    with torch.no_grad():
        assert layer(torch.empty(3, 24, device="meta", dtype=torch.float64)).device.type == "meta"
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    assert agrees(layer)


def test_the_weight_is_another_parameter(layer: BoneLinear) -> None:
    for _ in range(2):
        layer.base_layer.weight = nn.Parameter(torch.randn_like(layer.weight))
        assert agrees(layer)
    layer.bone_block["a0"] = nn.Parameter(torch.randn_like(layer.bone_block["a0"]))
    assert agrees(layer)


def test_the_base_layer_is_another(layer: BoneLinear) -> None:
    layer.base_layer = nn.Linear(24, 16, dtype=torch.float64)
    assert agrees(layer)


def test_the_bias_is_read_anew(layer: BoneLinear) -> None:
    assert layer.bias is not None
    layer.bias.data.add_(1)
    assert agrees(layer)


def test_adapters_come_and_go(layer: BoneLinear) -> None:
    add(layer, "b", "bone", r=5)
    assert agrees(layer)
    layer.set_adapter(["a0", "b"])
    assert agrees(layer)
    layer.set_adapter(["b", "a0"])
    assert agrees(layer)
    layer.delete_adapter("b")
    assert agrees(layer)
    add(layer, "b", "bone", r=3)  # another adapter under the name
    layer.set_adapter(["b", "a0"])
    assert agrees(layer)


def test_the_same_block_as_another_variant() -> None:
    layer = adapted("bat", width=16).eval()
    layer.cache_weight = True
    x = torch.randn(3, 16, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
        block = layer.bone_block["a0"]
        layer.delete_adapter("a0")
        add(layer, "a0", "bat in")
        layer.bone_block["a0"] = block
        layer.set_adapter("a0")
        torch.testing.assert_close(layer(x), plain_forward(layer, x))


def test_one_block_under_two_names() -> None:
    layer = adapted("bat", width=16).eval()
    add(layer, "in", "bat in")
    layer.bone_block["in"] = layer.bone_block["a0"]
    layer.cache_weight = True
    x = torch.randn(3, 16, dtype=torch.float64)
    with torch.no_grad():
        for name in ("a0", "in", "a0"):
            layer.set_adapter(name)
            torch.testing.assert_close(layer(x), plain_forward(layer, x))


def test_an_active_adapter_that_the_layer_lacks(layer: BoneLinear) -> None:
    layer.set_adapter(["elsewhere", "a0"])
    assert agrees(layer)
    first = kept(layer)
    assert first is not None
    assert agrees(layer)
    assert kept(layer) is first
    layer.bone_block["a0"].data.add_(1)
    assert agrees(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_at_a_page(dtype: torch.dtype) -> None:
    layer = kept_layer(dtype=torch.float32).to(dtype).eval()
    with torch.no_grad():
        layer(tokens(layer))
    weight = kept(layer)
    assert weight is not None
    assert weight.data_ptr() % 4096 == 0


def test_disabling_and_merging(layer: BoneLinear) -> None:
    x = tokens(layer)
    with torch.no_grad():
        adapted_y, base_y = layer(x), layer.base_layer(x)
        layer.disable_adapters()
        torch.testing.assert_close(layer(x), base_y)
        layer.enable_adapters()
        torch.testing.assert_close(layer(x), adapted_y)
        layer.merge()
        assert kept(layer) is None
        torch.testing.assert_close(layer(x), adapted_y)
        layer.unmerge()
        layer.bone_block["a0"].data.zero_()
        torch.testing.assert_close(layer(x), base_y)


def test_training_mode_keeps_nothing(layer: BoneLinear) -> None:
    layer.train()
    assert kept(layer) is None
    assert agrees(layer)
    assert kept(layer) is None


def test_wanted_gradients_are_given(layer: BoneLinear) -> None:
    x = tokens(layer)
    y = layer(x)
    assert y.requires_grad
    y.sum().backward()
    assert layer.bone_block["a0"].grad is not None
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    x.requires_grad_()
    assert layer(x).requires_grad


def test_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        layer = kept_layer()
        assert agrees(layer)
        assert kept(layer) is not None
        for write in (under_no_grad, data_add, data_assigned):
            write(layer.weight)
            assert agrees(layer)
    assert agrees(layer)


def test_copies_have_a_cache_of_their_own(layer: BoneLinear) -> None:
    other = copy.deepcopy(layer)
    assert other.cache_weight
    assert kept(other) is None
    assert agrees(other)
    other.weight.data.add_(1)
    assert agrees(other)
    assert agrees(layer)
    layer.weight.data.sub_(1)
    assert agrees(other)
    assert agrees(layer)


def test_pickles_hold_no_second_weight(layer: BoneLinear) -> None:
    plain = pickle.dumps(adapted("bat").eval())
    pickled = pickle.dumps(layer)
    assert abs(len(pickled) - len(plain)) < 100
    other = pickle.loads(pickled)  # of our own making
    assert other.cache_weight
    assert agrees(other)
    assert agrees(layer)


def test_saving_changes_nothing(layer: BoneLinear) -> None:
    torch.save(layer.state_dict(), io.BytesIO())
    assert agrees(layer)
    assert list(layer.state_dict()) == ["base_layer.weight", "base_layer.bias", "bone_block.a0"]


def test_switching_it_off_frees_the_weight(layer: BoneLinear) -> None:
    layer.cache_weight = False
    assert kept(layer) is None
    assert agrees(layer)
    assert kept(layer) is None


def test_reading_does_not_part_a_source_from_its_clone(layer: BoneLinear) -> None:
    """The operations of a forward leave W' kept; else it would be formed anew each time."""
    first = kept(layer)
    weight = layer.weight
    x = tokens(layer)
    _ = x @ weight.t(), weight.clone(), weight.sum(), weight.float(), torch.isfinite(weight).all()
    layer.disable_adapters()
    layer(x)
    layer.enable_adapters()
    layer(x).sum().backward()
    assert agrees(layer)
    assert kept(layer) is first


def test_compiled_code_keeps_nothing(layer: BoneLinear) -> None:
    layer.drop_cache()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = tokens(layer)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain_forward(layer, x))
        assert kept(layer) is None
        layer.weight.data.add_(1)
        torch.testing.assert_close(compiled(x), plain_forward(layer, x))


def test_the_watch_names_what_happened() -> None:
    source = torch.zeros(4)
    watch = cache._Watch.of(source)
    assert watch is not None
    assert not watch.is_exposed(source)
    assert not watch.is_exposed(source.clone())
    source.data.add_(1)
    assert watch.is_exposed(source)
    again = cache._Watch.of(source)
    assert again is not None
    source.add_(1)
    assert not again.is_exposed(source)


def test_bone_needs_no_cache_to_be_right() -> None:
    layer = adapted()
    layer.add_adapter("b", r=4, variant=Variant.BONE)
    layer.set_adapter("b")
    layer.eval()
    data_add(layer.bone_block["b"])
    assert agrees(layer)
