from __future__ import annotations

import copy
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from boneconv.config import Axis, Variant
from boneconv.errors import ConfigError, NonFiniteError, ShapeError
from boneconv.kernels import RowMerger, Scratch, Stage
from boneconv.nn import BoneLinear
from tests.nn.layers import KINDS, adapted, add, plain_forward, plain_weight

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


# Merging


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


# Forward


@pytest.mark.parametrize("shape", [(24,), (1, 24), (0, 24), (2, 3, 24), (2, 0, 24), (1, 2, 3, 24)])
@pytest.mark.parametrize("kind", ALL)
def test_shapes_of_inputs(kind: str, shape: tuple[int, ...]) -> None:
    layer = adapted(kind)
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*shape[:-1], 16)
    torch.testing.assert_close(y, plain_forward(layer, x))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("kind", ALL)
def test_strided_inputs_and_weights(kind: str) -> None:
    layer = adapted(kind)
    layer.base_layer.weight = nn.Parameter(torch.randn(24, 16, dtype=torch.float64).t())
    for tokens in (2, 7):
        x = torch.randn(48, tokens, dtype=torch.float64).t()[:, ::2]
        torch.testing.assert_close(layer(x), plain_forward(layer, x))


def test_the_wrong_width_is_an_error_of_ours() -> None:
    for kind in ALL:
        with pytest.raises(ShapeError, match=r"expected \[..., 24\], found \[2, 28\]"):
            adapted(kind)(torch.zeros(2, 28, dtype=torch.float64))


@pytest.mark.parametrize("kinds", [[kind] for kind in ALL] + [["bone", "bat", "mini"]])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_pointwise_convolution_is_a_linear_layer(
    kinds: list[str], memory: torch.memory_format
) -> None:
    torch.manual_seed(0)
    layer = BoneLinear(nn.Conv2d(24, 16, 1, dtype=torch.float64).to(memory_format=memory))
    for i, kind in enumerate(kinds):
        add(layer, f"a{i}", kind)
    layer.set_adapter([f"a{i}" for i in range(len(kinds))])
    assert (layer.in_features, layer.out_features) == (24, 16)
    weight = plain_weight(layer)
    for shape in ((2, 24, 3, 5), (24, 3, 5)):
        x = torch.randn(shape, dtype=torch.float64)
        expected = F.conv2d(x, weight[:, :, None, None], layer.bias)
        torch.testing.assert_close(layer(x), expected)
        layer.cache_weight = True
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), expected)
        layer.cache_weight = False
    before = layer.weight.detach().clone()
    layer.merge(safe_merge=True)
    assert layer.weight.shape == (16, 24, 1, 1)
    torch.testing.assert_close(layer(x), expected)
    layer.disable_adapters()
    torch.testing.assert_close(layer(x), F.conv2d(x, before, layer.bias))
    layer.unmerge()
    assert torch.equal(layer.weight, before)


class Doubling(nn.Linear):
    """A subclass with a forward of its own, which takes more."""

    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return factor * super().forward(x)


def test_a_subclass_computes_its_own_forward() -> None:
    torch.manual_seed(0)
    layer = BoneLinear(Doubling(24, 16, dtype=torch.float64))
    add(layer, "a", "bone")
    layer.set_adapter("a")
    x = torch.randn(5, 24, dtype=torch.float64)
    change = plain_forward(layer, x) - F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), 2 * F.linear(x, layer.weight, layer.bias) + change)
    torch.testing.assert_close(layer(x, factor=3.0) - layer(x, 2.0), layer.base_layer(x) / 2)


@pytest.mark.parametrize("kind", ["bone", "mini", "bat in"])
def test_hooks_of_the_base_layer_run_and_what_they_hold_is_not_written_to(kind: str) -> None:
    layer = adapted(kind)
    seen: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain_forward(layer, x))
    (held,) = seen
    given = x + (plain_input_change(layer, x) if kind == "bat in" else 0)
    torch.testing.assert_close(held, F.linear(given, layer.weight, layer.bias))


def plain_input_change(layer: BoneLinear, x: Tensor) -> Tensor:
    block = layer.bone_block["a0"]
    return torch.cat([s @ b.t() for s, b in zip(x.split(4, -1), block, strict=True)], -1)


@pytest.mark.parametrize("kinds", [[kind] for kind in ALL] + [["bat", "bone"]])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kinds: list[str], reentrant: bool) -> None:
    layer = adapted(*kinds)
    x = torch.randn(9, 24, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.bone_block.values()]
    layer(x).square().sum().backward()
    expected = [p.grad for p in wanted]
    for p in wanted:
        p.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for p, grad in zip(wanted, expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad)


STACKS = [*([kind] for kind in ALL), ["bone", "bat", "bat in"]]


@pytest.mark.parametrize("kinds", STACKS, ids=" then ".join)
@pytest.mark.parametrize("tokens", [2, 9])
def test_compiles_without_a_break(kinds: list[str], tokens: int) -> None:
    torch.compiler.reset()
    layer = adapted(*kinds)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.bone_block.values()]
    y, z = layer(x), compiled(x)
    torch.testing.assert_close(z, y)
    grad = torch.randn_like(y)
    for mine, expected in zip(
        torch.autograd.grad(z, wanted, grad), torch.autograd.grad(y, wanted, grad), strict=True
    ):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("kinds", STACKS, ids=" then ".join)
@pytest.mark.parametrize("strict", [True, False])
def test_exports_to_plain_operators(kinds: list[str], strict: bool) -> None:
    layer = adapted(*kinds).eval()
    x = torch.randn(9, 24, dtype=torch.float64)
    exported = torch.export.export(layer, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), layer(x))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in called)


@pytest.mark.parametrize("kinds", STACKS, ids=" then ".join)
def test_function_transforms_give_the_same_gradient(kinds: list[str]) -> None:
    layer = adapted(*kinds)
    x = torch.randn(3, 24, dtype=torch.float64)

    def loss(block: Tensor) -> Tensor:
        parameters = {**dict(layer.named_parameters()), "bone_block.a0": block}
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    block = layer.bone_block["a0"].detach()
    by_function = torch.func.grad(loss)(block)
    layer(x).square().sum().backward()
    torch.testing.assert_close(by_function, layer.bone_block["a0"].grad)


def test_dropout_of_training_alone() -> None:
    layer = adapted(dtype=torch.float32)
    layer.add_adapter("d", r=4, dropout=0.5, init_weights=False)
    layer.set_adapter("d")
    x = torch.randn(64, 24)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


def test_repr_names_the_adapters() -> None:
    assert "a0=bone, a1=bat, active=['a0', 'a1'], merged=[]" in repr(adapted("bone", "bat"))


@pytest.mark.parametrize("kind", ["bone", "mini", "bat", "bat in"])
@pytest.mark.parametrize("width", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_may_be_narrower_than_the_weight(kind: str, width: torch.dtype) -> None:
    layer = adapted(dtype=torch.float64)
    add(layer, "n", kind, dtype=width)
    layer.set_adapter("n")
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = F.linear(x, plain_weight(layer), layer.bias)
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.sum(), [x, layer.bone_block["n"]])
    wanted = torch.autograd.grad(expected.sum(), [x, layer.bone_block["n"]])
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


# PEFT as the oracle


@pytest.mark.parametrize(
    ("kind", "width"), [("bone", 24), ("bone", 22), ("mini", 24), ("mini", 22), ("bat", 24)]
)
def test_outputs_and_gradients_are_pefts(kind: str, width: int) -> None:
    from peft.tuners.miss.layer import MissLinear

    layer = adapted(kind, width=width, dtype=torch.float32)
    init = True if kind == "bone" else kind
    base = copy.deepcopy(layer.base_layer)
    theirs = MissLinear(base, "a0", r=4, mini_r=4, init_weights=init)
    with torch.no_grad():
        theirs.miss_block["a0"].copy_(layer.bone_block["a0"])
    for tokens in (2, 9):
        x = torch.randn(3, tokens, width, requires_grad=True)
        y, z = layer(x), theirs(x)
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(y)
        mine = torch.autograd.grad(y, [x, layer.bone_block["a0"]], grad)
        expected = torch.autograd.grad(z, [x, theirs.miss_block["a0"]], grad)
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_axis_in_is_not_axis_out() -> None:
    layer = adapted(width=16)
    add(layer, "o", "bat")
    add(layer, "i", "bat in")
    with torch.no_grad():
        layer.bone_block["i"].copy_(layer.bone_block["o"])
    x = torch.randn(3, 16, dtype=torch.float64)
    layer.set_adapter("o")
    y = layer(x)
    layer.set_adapter("i")
    assert layer.updates()[0].axis is Axis.IN
    assert not torch.allclose(layer(x), y)
