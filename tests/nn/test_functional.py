from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from boneconv.config import Axis, Variant
from boneconv.errors import ConfigError, ShapeError
from boneconv.nn import bat
from boneconv.nn.functional import (
    adapted_linear,
    bat_linear,
    bone_linear,
    slice_sum,
    turn_input,
)
from boneconv.nn.updates import Update, block_shape
from boneconv.nn.weights import compose
from tests.nn.layers import KINDS, adapted, plain_forward, reference_weight

ALL = list(KINDS)
STACKS = [
    *([kind] for kind in ALL),
    *(list(pair) for pair in itertools.product(ALL, ALL)),
    ["bat in", "bat", "bone", "bat in"],
    ["bone", "bat", "bat", "mini"],
]


@given(st.integers(1, 40), st.integers(1, 50), st.lists(st.integers(0, 4), max_size=2))
def test_slice_sum_is_the_sum_of_the_padded_slices(r: int, width: int, lead: list[int]) -> None:
    x = torch.arange(float(torch.Size([*lead, width]).numel())).reshape(*lead, width)
    before = x.clone()
    padded = F.pad(x, (0, -width % r))
    expected = padded.reshape(*lead, padded.shape[-1] // r, r).sum(-2)
    assert torch.equal(slice_sum(x, r), expected)
    assert torch.equal(x, before)


def test_turn_input_multiplies_every_slice_by_its_block() -> None:
    torch.manual_seed(0)
    x, block = torch.randn(2, 3, 8), torch.randn(2, 4, 4)
    turned, total = turn_input(x, block)
    expected = torch.cat([x[..., :4] @ block[0].t(), x[..., 4:] @ block[1].t()], -1)
    torch.testing.assert_close(turned, expected)
    torch.testing.assert_close(total, expected[..., :4] + expected[..., 4:])


@pytest.mark.parametrize("kinds", STACKS, ids=" then ".join)
def test_a_stack_is_the_formula_applied_in_order(kinds: list[str]) -> None:
    layer = adapted(*kinds)
    weight = reference_weight(layer)
    torch.testing.assert_close(compose(layer.weight, layer.updates()).detach().numpy(), weight)
    for tokens in (1, 3, 9):  # either side of the rank
        x = torch.randn(2, tokens, 24, dtype=torch.float64)
        y = adapted_linear(x, layer.weight, layer.bias, layer.updates())
        torch.testing.assert_close(y, F.linear(x, torch.from_numpy(weight), layer.bias))


@pytest.mark.parametrize("kinds", STACKS, ids=" then ".join)
@pytest.mark.parametrize("tokens", [2, 9])
def test_gradients_are_those_of_the_plain_formula(kinds: list[str], tokens: int) -> None:
    layer = adapted(*kinds)
    layer.base_layer.requires_grad_()
    x = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    grad = torch.randn(tokens, 16, dtype=torch.float64)
    ours = torch.autograd.grad(layer(x), wanted, grad)
    plain = torch.autograd.grad(plain_forward(layer, x), wanted, grad)
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("function", [bat_linear, bone_linear])
def test_gradcheck(function: object, tokens: int) -> None:
    torch.manual_seed(0)
    shape = (2, 4, 4) if function is bat_linear else (3, 8)
    shapes = [(tokens, 12), (8, 12), (8,), shape]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("tokens", [3, 200])
def test_single_precision_gradients(kind: str, tokens: int) -> None:
    layer = adapted(kind, out=64, width=96, r=16, dtype=torch.float32)
    x = torch.randn(tokens, 96, requires_grad=True)
    wanted = [x, layer.bone_block["a0"]]
    grad = torch.randn(tokens, 64) / tokens
    ours = torch.autograd.grad(layer(x), wanted, grad)
    plain = torch.autograd.grad(plain_forward(layer, x), wanted, grad)
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 40])
def test_bat_in_chunks_is_bat_at_once(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapted("bat", out=32, width=24)
    layer.base_layer.requires_grad_()
    x = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]

    def run() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y))]

    at_once = run()
    monkeypatch.setattr(bat, "_WHOLE", 0)
    monkeypatch.setattr(bat, "_SMALL", 1)
    monkeypatch.setattr(bat, "_AHEAD", 1 << 30)
    monkeypatch.setattr(bat, "_BESIDE", 1 << 30)
    for part, whole in zip(run(), at_once, strict=True):
        torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("kind", ALL)
def test_only_wanted_gradients_are_computed(kind: str) -> None:
    layer = adapted(kind)
    x = torch.randn(9, 24, dtype=torch.float64)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is None
    assert layer.bone_block["a0"].grad is not None
    layer.bone_block["a0"].requires_grad_(False)
    layer.bone_block["a0"].grad = None
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.bone_block["a0"].grad is None


@pytest.mark.parametrize("kind", ["bat", "bone"])
@pytest.mark.parametrize("tokens", [2, 40])
def test_autograd_keeps_x_and_the_parameters_alone(kind: str, tokens: int) -> None:
    layer = adapted(kind, dtype=torch.float32)
    x = torch.randn(tokens, 24, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    beyond = [t for t in kept if t.untyped_storage().data_ptr() not in known]
    # Bone: the sums of x's slices, r numbers a token, in the place of x
    assert [tuple(t.shape) for t in beyond] == ([] if kind == "bat" else [(tokens, 4)])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 40])
def test_half_precision_follows_the_formula(kind: str, half: torch.dtype, tokens: int) -> None:
    layer = adapted(kind, dtype=torch.float32).to(half)
    x = torch.randn(tokens, 24, dtype=half, requires_grad=True)
    wanted = [x, layer.bone_block["a0"]]
    y = layer(x)
    assert y.dtype == half
    ours = [y, *torch.autograd.grad(y, wanted, torch.ones_like(y))]
    exact = adapted(kind).requires_grad_(False)
    exact.load_state_dict(layer.state_dict())
    exact.requires_grad_()
    wide = x.detach().double().requires_grad_()
    z = plain_forward(exact, wide)
    expected = [z, *torch.autograd.grad(z, [wide, exact.bone_block["a0"]], torch.ones_like(z))]
    for mine, value in zip(ours, expected, strict=True):
        assert mine.dtype == half
        assert (mine.double() - value).norm() <= 2 * torch.finfo(half).eps * value.norm()


@pytest.mark.parametrize("kind", ALL)
def test_a_wider_block_gives_the_base_layers_dtype(kind: str) -> None:
    layer = adapted(kind, dtype=torch.float32)
    layer.base_layer.bfloat16()
    x = torch.randn(9, 24, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = F.linear(x.float(), plain_weight_of(layer), layer.bias.float())
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.05)
    y.sum().backward()
    assert layer.bone_block["a0"].grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def plain_weight_of(layer: object) -> Tensor:
    return torch.from_numpy(reference_weight(layer)).float()  # type: ignore[arg-type]


@pytest.mark.parametrize("kinds", STACKS[:8], ids=" then ".join)
@pytest.mark.parametrize("tokens", [2, 40])
def test_autocast_computes_in_half_and_keeps_the_parameters_gradients(
    kinds: list[str], tokens: int
) -> None:
    layer = adapted(*kinds, dtype=torch.float32)
    x = torch.randn(tokens, 24, requires_grad=True)
    wanted = [x, *layer.bone_block.values()]
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
    ours = torch.autograd.grad(y, wanted, torch.ones_like(y))
    expected = torch.autograd.grad(plain, wanted, torch.ones_like(plain))
    for mine, value in zip([y, *ours], [plain, *expected], strict=True):
        assert (mine.float() - value).norm() <= 0.03 * value.norm()
    assert all(t.dtype == torch.float32 for t in ours)


@pytest.mark.parametrize("kind", ALL)
def test_no_argument_is_written_to(kind: str) -> None:
    layer = adapted(kind, dtype=torch.float32)
    x = torch.randn(9, 24)
    before = [t.clone() for t in (x, *layer.parameters())]
    layer(x)
    with torch.no_grad():
        layer(x)
    for now, then in zip((x, *layer.parameters()), before, strict=True):
        assert torch.equal(now, then)


@given(
    st.sampled_from(ALL),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 8),
    st.booleans(),
)
def test_any_shape(kind: str, out: int, width: int, r: int, tokens: int, bias: bool) -> None:
    ragged = 0 if "bat" in kind else 1
    layer = adapted(kind, out=out * r * 4, width=width * r + ragged, r=r, bias=bias)
    x = torch.randn(tokens, width * r + ragged, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain_forward(layer, x))


@pytest.mark.parametrize(
    ("variant", "axis", "r", "expected"),
    [
        (Variant.BONE, Axis.OUT, 5, (5, 16)),
        (Variant.MINI, Axis.OUT, 5, (5, 4)),
        (Variant.BAT, Axis.OUT, 8, (2, 8, 8)),
        (Variant.BAT, Axis.IN, 8, (3, 8, 8)),
    ],
)
def test_block_shapes(variant: Variant, axis: Axis, r: int, expected: tuple[int, ...]) -> None:
    assert block_shape(variant, axis, r, 4, (16, 24)) == expected


@pytest.mark.parametrize("r", [3, 5, 16, 24])
@pytest.mark.parametrize("axis", list(Axis))
def test_bat_needs_a_rank_that_divides_both_sides(r: int, axis: Axis) -> None:
    with pytest.raises(ShapeError, match=f"divides 16 and 24, found {r}"):
        block_shape(Variant.BAT, axis, r, 1, (16, 24))


def test_mini_r_divides_out() -> None:
    with pytest.raises(ShapeError, match="mini_r"):
        block_shape(Variant.MINI, Axis.OUT, 4, 5, (16, 24))
    with pytest.raises(ConfigError, match="mini_r must be a positive"):
        block_shape(Variant.MINI, Axis.OUT, 4, 0, (16, 24))
    with pytest.raises(ConfigError, match="r must be a positive"):
        block_shape(Variant.BONE, Axis.OUT, -1, 1, (16, 24))


def test_what_does_not_fit_is_refused() -> None:
    weight = torch.zeros(16, 24)
    with pytest.raises(ShapeError, match="input"):
        adapted_linear(torch.zeros(2, 23), weight, None, [])
    for shape in [(4, 15), (4,), (0, 16), (2, 4, 4)]:
        with pytest.raises(ShapeError, match="block"):
            adapted_linear(
                torch.zeros(2, 24), weight, None, [Update(Variant.BONE, torch.zeros(shape))]
            )


@pytest.mark.parametrize("kind", ["bone", "mini"])
def test_dropout_falls_on_the_updates_input_alone(kind: str) -> None:
    layer = adapted(dtype=torch.float32)
    layer.add_adapter("d", r=4, variant=KINDS[kind][0], mini_r=4, dropout=0.5)
    layer.set_adapter("d")
    x = torch.randn(9, 24)
    torch.testing.assert_close(layer.train()(x), layer.base_layer(x))  # zeros change nothing
    torch.nn.init.normal_(layer.bone_block["d"])
    update = layer.updates()[0]
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    change = slice_sum(F.dropout(x, 0.5), 4) @ update.block
    expected = layer.base_layer(x).view(9, -1, change.shape[1]) + change[:, None]
    torch.testing.assert_close(y, expected.view(9, 16))
    torch.testing.assert_close(layer.eval()(x), plain_forward(layer, x))
