"""Every way a weight can be written to, and that a kept W' never outlives one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from boneconv.nn import BoneLinear, cache
from tests.nn.kept import agrees, kept, kept_layer, tokens
from tests.nn.layers import adapted
from tests.nn.writes import PARAMETERS, WRITES


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("which", sorted(PARAMETERS))
def test_a_write_is_noticed(layer: BoneLinear, which: str, write: Callable[[Tensor], None]) -> None:
    x = tokens(layer)
    with torch.no_grad():
        before = layer(x)
    for _ in range(3):
        write(PARAMETERS[which](layer))
        assert agrees(layer)
        assert agrees(layer)
    with torch.no_grad():
        assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("which", sorted(PARAMETERS))
def test_a_write_through_an_older_alias_is_noticed(
    which: str, write: Callable[[Tensor], None]
) -> None:
    layer = kept_layer()
    aliases = [PARAMETERS[which](layer).data, PARAMETERS[which](layer).detach()]
    assert agrees(layer)
    for alias in aliases:
        write(alias)
        assert agrees(layer)


@pytest.mark.parametrize("which", sorted(PARAMETERS))
def test_an_address_that_was_taken_is_not_trusted(layer: BoneLinear, which: str) -> None:
    array = PARAMETERS[which](layer).detach().numpy()
    for _ in range(3):
        array += 1  # torch sees none of it
        assert agrees(layer)
        assert kept(layer) is None
    layer.eval()
    del array
    assert agrees(layer)
    assert kept(layer) is not None


def test_an_address_taken_before_is_the_callers_to_announce() -> None:
    layer = kept_layer()
    array = layer.weight.detach().numpy()
    assert agrees(layer)
    array += 1
    layer.drop_cache()
    assert agrees(layer)


@pytest.mark.parametrize(
    "foreign",
    [lambda t: torch.from_numpy(t.numpy().copy()), lambda t: t.clone().share_memory_()],
    ids=["numpy", "shared memory"],
)
def test_memory_that_torch_does_not_own_is_never_trusted(
    foreign: Callable[[Tensor], Tensor],
) -> None:
    layer = kept_layer()
    layer.base_layer.weight = nn.Parameter(foreign(layer.weight.detach()), requires_grad=False)
    array = layer.weight.detach().numpy()
    for _ in range(2):
        assert agrees(layer)
        assert kept(layer) is None
        array += 1
    assert agrees(layer)


def test_switching_it_on_gives_parameters_memory_of_their_own() -> None:
    layer = adapted("bat").eval()
    array = layer.weight.detach().numpy().copy()
    tied = nn.Parameter(torch.from_numpy(array), requires_grad=False)
    layer.base_layer.weight = tied
    before = tied.detach().clone()
    layer.cache_weight = True
    assert layer.weight is tied
    assert torch.equal(tied, before)
    assert agrees(layer)
    assert kept(layer) is not None
    array += 1  # no longer the parameter's memory
    assert torch.equal(tied, before)
    assert agrees(layer)


def test_without_lazy_clones_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = kept_layer()
    monkeypatch.delattr(torch, "_lazy_clone")
    assert agrees(layer)
    assert kept(layer) is None
    layer.weight.data.add_(1)
    assert agrees(layer)


@pytest.mark.parametrize("which", sorted(PARAMETERS))
def test_where_processes_share_the_work_storages_may_be_resized(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP frees and refills a parameter's storage between uses."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    layer = kept_layer()
    assert agrees(layer)
    assert kept(layer) is None
    resize(PARAMETERS[which](layer))
    assert agrees(layer)


@pytest.mark.parametrize("which", sorted(PARAMETERS))
def test_dropping_gives_the_sources_ordinary_memory_again(layer: BoneLinear, which: str) -> None:
    p = PARAMETERS[which](layer)
    address = cache._address(p)
    assert cache._is_lazy(p)
    layer.drop_cache()
    assert not cache._is_lazy(p)
    assert p.data_ptr() == address
    resize(p)
    assert agrees(layer)


def resize(p: Tensor) -> None:
    fresh = torch.randn_like(p)
    size = p.untyped_storage().nbytes()
    p.untyped_storage().resize_(0)
    p.untyped_storage().resize_(size)
    p.data.copy_(fresh)
