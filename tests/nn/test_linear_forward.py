"""The forward of a layer: inputs, base layers, gradients and compilers, and PEFT as the oracle."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from boneconv.config import Axis
from boneconv.errors import ShapeError
from boneconv.nn import BoneLinear
from tests.nn.layers import KINDS, adapted, add, plain_forward, plain_weight

ALL = list(KINDS)


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
