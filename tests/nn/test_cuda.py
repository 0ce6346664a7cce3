"""One code path for every device: what runs on a CPU runs on meta and on CUDA, there alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import boneconv.nn
from tests.nn.layers import KINDS, adapted

STACKS = [[kind] for kind in KINDS] + [["bone", "bat", "bat in", "mini"]]
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class OnlyOn(TorchDispatchMode):
    """Fails on any operation that takes or gives a tensor of another device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.calls = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                assert leaf.device.type == self.device, f"{function} on {leaf.device}"
        return result


def exercise(device: str, kinds: list[str], dtype: torch.dtype) -> None:
    """Forward, backward and a kept weight, with all tensors of one device."""
    layer = adapted(*kinds, dtype=torch.float32).to(device=device, dtype=dtype)
    with OnlyOn(device) as seen:
        for tokens in (2, 40):
            x = torch.empty(tokens, 24, device=device, dtype=dtype).fill_(0.5).requires_grad_()
            layer.train()(x).sum().backward()
            assert layer.bone_block["a0"].grad is not None
            assert layer.bone_block["a0"].grad.device.type == device
            with torch.no_grad():
                assert layer.eval()(x).device.type == device
                layer.cache_weight = True
                assert layer(x).shape == (tokens, 16)
                layer.cache_weight = False
    assert seen.calls > 10


@pytest.mark.parametrize("kinds", STACKS, ids=" then ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_makes_no_cpu_tensor(kinds: list[str], dtype: torch.dtype) -> None:
    exercise("meta", kinds, dtype)


@pytest.mark.parametrize("kinds", STACKS, ids=" then ".join)
def test_meta_adapters_and_merges_make_no_cpu_tensor(kinds: list[str]) -> None:
    layer = adapted(*kinds, dtype=torch.bfloat16).to("meta")
    with OnlyOn("meta") as seen:
        layer.add_adapter("n", r=4)
        layer.set_adapter([*layer.active_adapters, "n"])
        layer.merge()
        assert layer.weight.device.type == "meta"
        layer.unmerge()
    assert seen.calls > 3


def test_the_watchman_notices() -> None:
    with pytest.raises(AssertionError, match="on cpu"), OnlyOn("meta"):
        torch.zeros(3)


def _names() -> Iterator[tuple[str, str]]:
    for path in Path(boneconv.nn.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                yield path.name, node.attr


def test_no_code_path_of_cudas_own() -> None:
    assert not [(path, name) for path, name in _names() if name == "cuda"]


@pytest.mark.cuda
@no_cuda
@pytest.mark.parametrize("kinds", STACKS, ids=" then ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_makes_no_cpu_tensor(kinds: list[str], dtype: torch.dtype) -> None:
    exercise("cuda", kinds, dtype)


@pytest.mark.cuda
@no_cuda
@pytest.mark.parametrize("kinds", STACKS, ids=" then ".join)
@pytest.mark.parametrize("tokens", [2, 40])
def test_cuda_gives_what_the_cpu_gives(kinds: list[str], tokens: int) -> None:
    here, there = adapted(*kinds), adapted(*kinds).to("cuda")
    x = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    far = x.detach().to("cuda").requires_grad_()
    y, z = here(x), there(far)
    torch.testing.assert_close(z.cpu(), y)
    mine = torch.autograd.grad(y.sum(), [x, *here.bone_block.values()])
    other = torch.autograd.grad(z.sum(), [far, *there.bone_block.values()])
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(b.cpu(), a)
    torch.testing.assert_close(there.merged_weight().cpu(), here.merged_weight())


@pytest.mark.cuda
@no_cuda
def test_cuda_keeps_a_weight_until_one_changes() -> None:
    layer = adapted("bat").to("cuda").eval()
    layer.cache_weight = True
    x = torch.randn(3, 24, dtype=torch.float64, device="cuda")
    with torch.no_grad():
        first = layer(x)
        kept = layer._cache.kept
        assert kept is not None
        assert torch.equal(layer(x), first)
        assert layer._cache.kept is kept
        layer.weight.data.add_(1)
        assert not torch.allclose(layer(x), first)


@pytest.mark.cuda
@no_cuda
@pytest.mark.parametrize("kinds", STACKS, ids=" then ".join)
def test_cuda_autocast(kinds: list[str]) -> None:
    layer = adapted(*kinds, dtype=torch.float32).to("cuda")
    x = torch.randn(40, 24, device="cuda")
    plain = layer(x)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - plain).norm() <= 0.03 * plain.norm()
