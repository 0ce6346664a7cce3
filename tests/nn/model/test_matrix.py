"""Every way to say what is adapted, through everything that is done with a model.

The behaviour that PEFT 0.18.1 tests of Bone on its custom models.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from boneconv.config import BoneConfig
from boneconv.nn.model.bone_model import BoneModel
from tests.nn.model.modules import MLP, Deep, batch, belongs, ids, make, stir


@dataclass(frozen=True)
class Case:
    """A model, its input and a configuration."""

    options: dict[str, Any]
    kind: type[nn.Module] = MLP
    inputs: Callable[[], torch.Tensor] = batch
    built: dict[str, Any] = field(default_factory=dict)

    def base(self, **more: Any) -> nn.Module:
        return make(self.kind, **self.built, **more)

    def config(self) -> BoneConfig:
        return BoneConfig(**{"r": 2} | self.options)

    def model(self, name: str = "default") -> BoneModel:
        model = BoneModel(self.base(), self.config(), name)
        stir(model, name)
        return model


MISS = {"peft_type": "MISS"}
CASES = {
    "expression": Case({"target_modules": "lin0"}),
    "one": Case({"target_modules": ["lin0"]}),
    "other": Case({"target_modules": ["lin1"]}),
    "both": Case({"target_modules": ["lin0", "lin1"]}),
    "wide": Case({"target_modules": ["lin0"], "r": 30}),
    "odd": Case({"target_modules": ["lin0", "lin1"], "r": 7}),
    "head": Case({"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "excluded": Case({"target_modules": "all-linear", "exclude_modules": ["lin1"]}),
    "bias": Case({"target_modules": ["lin0"], "bias": "all"}),
    "no bias": Case({"target_modules": ["lin0"]}, built={"bias": False}),
    "bat": Case({"target_modules": ["lin0", "lin1"], "init_weights": "bat"}),
    "bat large": Case({"target_modules": ["lin0"], "init_weights": "bat", "r": 12}),
    "bat head": Case(
        {"target_modules": ["lin0"], "init_weights": "bat", "modules_to_save": ["lin1"]}
    ),
    "bat in": Case({"target_modules": ["lin1"], "init_weights": "bat", "r": 6, "axis": "in"}),
    "miss": Case(MISS | {"target_modules": ["lin0", "lin1"], "r": 5}),
    "miss bat": Case(MISS | {"target_modules": ["lin0"], "init_weights": "bat"}),
    "mini": Case(MISS | {"target_modules": ["lin0", "lin1"], "init_weights": "mini", "mini_r": 6}),
    "deep": Case({"target_modules": ["up", "down"]}, Deep, ids),
    "layers": Case({"target_modules": ["up"], "layers_to_transform": [0, 2]}, Deep, ids),
    "convolution": Case({"target_modules": ["mix"]}, Deep, ids),
    "bat convolution": Case({"target_modules": ["mix"], "init_weights": "bat"}, Deep, ids),
    "all": Case({"target_modules": "all-linear"}, Deep, ids),
    "embedding": Case({"target_modules": ["up"], "modules_to_save": ["embed"]}, Deep, ids),
    "smooth": Case({"target_modules": ["mix"], "modules_to_save": ["smooth"]}, Deep, ids),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@EACH
def test_it_begins_as_the_base_and_changes_with_training(case: Case) -> None:
    x, plain = case.inputs(), case.base()(case.inputs())
    model = BoneModel(case.base(), case.config())
    _close(model(x), plain)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not torch.allclose(model(x), plain)
    with model.disable_adapters():
        assert torch.equal(model(x), plain)


@EACH
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_unmerge_disable_and_unload(case: Case, safe_merge: bool) -> None:
    x, plain = case.inputs(), case.base()(case.inputs())
    model = case.model()
    adapted = model(x)
    assert not torch.allclose(adapted, plain, atol=1e-4)
    model.merge_adapter(safe_merge=safe_merge)
    _close(model(x), adapted)
    with model.disable_adapters():
        assert torch.equal(model(x), plain)
    _close(model(x), adapted)
    model.unmerge_adapter()
    assert torch.equal(model(x), adapted)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe_merge)
    _close(merged(x), adapted)
    assert set(merged.state_dict()) == set(case.base().state_dict())
    assert torch.equal(model.unload()(x), plain)


@EACH
def test_save_and_load(case: Case, tmp_path: Path) -> None:
    x, model = case.inputs(), case.model("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    again = BoneModel.from_pretrained(case.base(), tmp_path / "mine")
    assert torch.equal(again(x), model(x))
    if case.config().bias != "none":
        return  # one set of them, see the next test
    again.load_adapter(tmp_path / "mine", "second")
    again.set_adapter("second")
    assert torch.equal(again(x), model(x))


@EACH
def test_several_adapters_beside_each_other(case: Case) -> None:
    x, model = case.inputs(), case.model("a")
    first = model(x)
    if case.config().bias != "none":
        with pytest.raises(ValueError, match="trains biases already"):
            model.add_adapter("b", case.config())
        return
    model.add_adapter("b", case.config())
    stir(model, "b", seed=8)
    assert torch.equal(model(x), first)
    model.set_adapter("b")
    second = model(x)
    assert not torch.allclose(first, second, atol=1e-4)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(belongs(name, "b") for name in trained)
    model.merge_adapter(["b"])
    model.unmerge_adapter()
    assert torch.equal(model(x), second)
    with pytest.warns(UserWarning, match="'a' is active now"):
        model.delete_adapter("b")
    assert torch.equal(model(x), first)


@EACH
def test_parameters_without_memory(case: Case) -> None:
    model = BoneModel(case.base(), case.config(), low_cpu_mem_usage=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    full = case.model()
    model.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(model(case.inputs()), full(case.inputs()))


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    model = BoneModel(case.base().to(dtype), case.config())
    stir(model, scale=0.05)
    out = model(case.inputs())
    assert out.dtype == dtype
    assert out.isfinite().all()
    out.float().sum().backward()
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    torch.testing.assert_close(merged(case.inputs()), out, rtol=0.05, atol=0.1)
