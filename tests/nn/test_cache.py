"""Every way a weight can change, and that a kept W' never outlives one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from boneconv.config import Variant
from boneconv.nn import BoneLinear, cache
from tests.nn.layers import adapted, add, plain_forward


def kept_layer(*kinds: str, dtype: torch.dtype = torch.float64) -> BoneLinear:
    layer = adapted(*(kinds or ("bat",)), dtype=dtype).eval()
    layer.cache_weight = True
    return layer


def tokens(layer: BoneLinear) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(3, 24).to(layer.weight.dtype)


def agrees(layer: BoneLinear) -> bool:
    """Whether what the layer gives now is what its tensors say now."""
    x = tokens(layer)
    with torch.no_grad():
        return torch.allclose(layer(x), plain_forward(layer, x))


def kept(layer: BoneLinear) -> Tensor | None:
    found = layer._cache._kept
    return None if found is None else found[2]


@pytest.fixture
def layer() -> BoneLinear:
    layer = kept_layer()
    assert agrees(layer)
    assert kept(layer) is not None
    return layer


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


# What may be written: the base's weight, and the block

Parameter = Callable[[BoneLinear], Tensor]
PARAMETERS: dict[str, Parameter] = {
    "weight": lambda layer: layer.base_layer.weight,
    "block": lambda layer: layer.bone_block["a0"],
}


def optimizer_step(p: Tensor) -> None:
    p.requires_grad_()
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.1).step()


def adam_step(p: Tensor) -> None:
    p.requires_grad_()
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], lr=0.1, foreach=True).step()


def under_no_grad(p: Tensor) -> None:
    with torch.no_grad():
        p.add_(1)


def one_element(p: Tensor) -> None:
    with torch.no_grad():
        p.view(-1)[3] = 7


def copy_into(p: Tensor) -> None:
    with torch.no_grad():
        p.copy_(torch.randn_like(p))


def data_add(p: Tensor) -> None:
    p.data.add_(1)


def data_one_element(p: Tensor) -> None:
    p.data.view(-1)[5] = -3


def data_assigned(p: Tensor) -> None:
    p.data = torch.randn_like(p)


def data_swapped_back_and_forth(p: Tensor) -> None:
    held = p.data
    p.data = torch.zeros_like(p)
    held.mul_(2)
    p.data = held


def detached(p: Tensor) -> None:
    p.detach().mul_(-1)


def set_(p: Tensor) -> None:
    with torch.no_grad():
        p.set_(torch.randn_like(p))


def storage_copied(p: Tensor) -> None:
    p.untyped_storage().copy_(torch.randn_like(p).untyped_storage())


def by_numpy(p: Tensor) -> None:
    p.detach().numpy()[...] += 1


def by_dlpack(p: Tensor) -> None:
    np.from_dlpack(p.detach())
    torch.from_dlpack(p.detach()).add_(1)


def in_inference_mode(p: Tensor) -> None:
    with torch.inference_mode():
        p.add_(1)


def foreach(p: Tensor) -> None:
    torch._foreach_add_([p.data], 1.0)


def out_argument(p: Tensor) -> None:
    torch.add(p.data, 1, out=p.data)


def index_put(p: Tensor) -> None:
    p.data[torch.zeros_like(p, dtype=torch.bool).index_fill_(0, torch.tensor([0]), True)] = 4.0


def init(p: Tensor) -> None:
    nn.init.normal_(p)


def swapped(p: Tensor) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(torch.randn_like(p), requires_grad=p.requires_grad))


def vector_to_parameters(p: Tensor) -> None:
    nn.utils.vector_to_parameters(torch.randn(p.numel(), dtype=p.dtype), [p])


WRITES = [
    optimizer_step,
    adam_step,
    under_no_grad,
    one_element,
    copy_into,
    data_add,
    data_one_element,
    data_assigned,
    data_swapped_back_and_forth,
    detached,
    set_,
    storage_copied,
    by_numpy,
    by_dlpack,
    in_inference_mode,
    foreach,
    out_argument,
    index_put,
    init,
    swapped,
    vector_to_parameters,
]


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
    assert watch.state(source) is cache._State.SAME
    assert watch.state(source.clone()) is cache._State.CHANGED
    source.data.add_(1)
    assert watch.state(source) is cache._State.EXPOSED
    again = cache._Watch.of(source)
    assert again is not None
    source.add_(1)
    assert again.state(source) is cache._State.CHANGED


def test_bone_needs_no_cache_to_be_right() -> None:
    layer = adapted()
    layer.add_adapter("b", r=4, variant=Variant.BONE)
    layer.set_adapter("b")
    layer.eval()
    data_add(layer.bone_block["b"])
    assert agrees(layer)
