"""Modules that an adapter trains in full, and biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from boneconv.config import BoneConfig
from boneconv.errors import ConfigError
from boneconv.nn.model.bone_model import BoneModel
from boneconv.nn.model.saved_module import SavedModule
from tests.nn.model.modules import MLP, Deep, batch, bone, ids, make, stir


def _trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _with_head(adapter: str = "default") -> BoneModel:
    return bone(adapter=adapter, target_modules=["lin0"], modules_to_save=["lin1"])


# modules_to_save


def test_a_copy_is_trained_and_the_original_stays() -> None:
    model = _with_head()
    holder = model.model.lin1
    assert isinstance(holder, SavedModule)
    assert _trained(model) == {
        "model.lin0.bone_block.default",
        "model.lin1.modules_to_save.default.weight",
        "model.lin1.modules_to_save.default.bias",
    }
    assert torch.equal(holder.original_module.weight, make().lin1.weight)
    assert not torch.equal(holder.weight, holder.original_module.weight)
    with model.disable_adapters():
        assert holder.weight is holder.original_module.weight
        assert torch.equal(model(batch()), make()(batch()))


def test_merging_puts_the_copy_in_place_and_unloading_the_original() -> None:
    x = batch()
    model = _with_head()
    adapted = model(x)
    merged = model.merge_and_unload()
    assert type(merged.lin1) is nn.Linear
    torch.testing.assert_close(merged(x), adapted, rtol=1e-5, atol=1e-5)
    assert torch.equal(_with_head().unload()(x), make()(x))


def test_each_adapter_has_its_own_copy() -> None:
    x = batch()
    model = _with_head("a")
    model.add_adapter("b", model.peft_config["a"])
    stir(model, "b", seed=9)
    first = model(x)
    model.set_adapter("b")
    second = model(x)
    assert _trained(model) == {
        "model.lin0.bone_block.b",
        "model.lin1.modules_to_save.b.weight",
        "model.lin1.modules_to_save.b.bias",
    }
    assert not torch.allclose(first, second, atol=1e-2)
    model.set_adapter("a")
    assert torch.equal(model(x), first)
    model.set_adapter("b")
    model.delete_adapter("a")
    assert torch.equal(model(x), second)


def test_two_copies_of_one_module_cannot_run_at_once() -> None:
    model = _with_head("a")
    model.add_adapter("b", model.peft_config["a"])
    with pytest.raises(ConfigError, match="several adapters train 'lin1' in full: a, b"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"]
    model.add_adapter("c", BoneConfig(r=2, target_modules=["lin0"]))
    model.set_adapter(["c", "a"])
    assert model.active_adapters == ["c", "a"]


def test_modules_that_hold_others_are_replaced_whole() -> None:
    base = nn.Sequential(MLP(), nn.Linear(6, 12), MLP()).eval()
    config = BoneConfig(r=4, target_modules=["lin0"], modules_to_save=["2", "2.norm"])
    model = BoneModel(base, config)
    stir(model)
    adapted = model(batch())
    assert isinstance(base[2], SavedModule)
    copied = {n.removeprefix("model.2.modules_to_save.default.") for n in _trained(model)}
    assert copied == {"model.0.lin0.bone_block.default"} | set(MLP().state_dict())
    torch.testing.assert_close(model.merge_and_unload()(batch()), adapted, rtol=1e-5, atol=1e-5)


def test_names_that_are_not_there() -> None:
    options: dict[str, Any] = {"r": 4, "target_modules": ["lin0"]}
    with pytest.raises(ConfigError, match="none of the modules that modules_to_save names"):
        BoneModel(make(), BoneConfig(**options, modules_to_save=["classifier"]))
    with pytest.warns(UserWarning, match="entries of modules_to_save: classifier"):
        BoneModel(make(), BoneConfig(**options, modules_to_save=["classifier", "lin1"]))
    with pytest.raises(ConfigError, match="names a ModuleList, which has no forward"):
        BoneModel(make(Deep), BoneConfig(r=4, target_modules=["mix"], modules_to_save=["layers"]))


def test_an_adapted_layer_cannot_be_trained_in_full_by_another_adapter() -> None:
    model = bone()
    state = set(model.state_dict())
    with pytest.raises(ConfigError, match="'lin1' would be trained in full"):
        model.add_adapter(
            "b", BoneConfig(r=4, target_modules=["lin0"], modules_to_save=["lin1"])
        )  # fmt: skip
    model = _with_head()
    with pytest.raises(ConfigError, match="'lin1' cannot be adapted: another adapter trains it"):
        model.add_adapter("b", BoneConfig(r=4, target_modules=["lin0", "lin1"]))
    assert "b" not in model.peft_config
    assert state == set(bone().state_dict())


def test_integers_and_running_means_are_copied_and_saved(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = nn.Linear(12, 24)
            self.norm = nn.BatchNorm1d(24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.lin0(x))

    config = BoneConfig(r=4, target_modules=["lin0"], modules_to_save=["norm"])
    model = BoneModel(make(Normed), config).train()
    model(batch())
    model.eval()
    norm = model.model.norm
    assert norm.original_module.num_batches_tracked == 0
    assert norm.num_batches_tracked == 1
    with pytest.warns(UserWarning, match="saved in the Bone Adapter Format.*not floating"):
        model.save_pretrained(tmp_path)
    again = BoneModel.from_pretrained(make(Normed), tmp_path)
    assert again.model.norm.num_batches_tracked == 1
    assert torch.equal(again(batch()), model(batch()))


# Biases


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("bone_only", {"model.lin0.base_layer.bias"}),
        ("all", {"model.lin0.base_layer.bias", "model.norm.bias", "model.lin1.bias"}),
    ],
)
def test_which_biases_are_trained(bias: str, expected: set[str]) -> None:
    model = BoneModel(make(), BoneConfig(r=4, target_modules=["lin0"], bias=bias))
    assert _trained(model) == expected | {"model.lin0.bone_block.default"}


def test_layers_without_a_bias() -> None:
    config = BoneConfig(r=4, target_modules=["lin0", "lin1"], bias="bone_only")
    model = BoneModel(make(bias=False), config)
    assert all("bone_block" in name for name in _trained(model))


@pytest.mark.parametrize("bias", ["bone_only", "all"])
def test_without_the_adapter_the_biases_are_the_models_own(bias: str) -> None:
    x, plain = batch(), make()(batch())
    config = BoneConfig(r=4, target_modules=["lin0"], bias=bias)
    model = BoneModel(make(), config)
    stir(model)
    adapted = model(x)
    with model.disable_adapters():
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), adapted)
    model.add_adapter("other", BoneConfig(r=2, target_modules=["lin1"]))
    model.set_adapter("other")
    assert torch.equal(model(x), plain)
    assert _trained(model) == {"model.lin1.bone_block.other"}
    model.set_adapter(["default", "other"])
    assert torch.equal(model(x), adapted)
    model.merge_adapter(["default"])
    model.set_adapter("other")
    torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), plain)
    model.set_adapter("default")
    assert torch.equal(model(x), adapted)
    assert torch.equal(model.unload()(x), plain)


def test_merged_biases_stay() -> None:
    model = BoneModel(make(), BoneConfig(r=4, target_modules=["lin0"], bias="all"))
    stir(model)
    adapted = model(batch())
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(batch()), adapted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(merged.norm.bias, make().norm.bias)


def test_deleting_puts_the_models_own_biases_back() -> None:
    model = BoneModel(make(), BoneConfig(r=4, target_modules=["lin0"], bias="all"))
    stir(model)
    model.delete_adapter("default")
    assert torch.equal(model(batch()), make()(batch()))


def test_only_one_adapter_trains_biases() -> None:
    config = BoneConfig(r=4, target_modules=["lin0"], bias="all")
    model = BoneModel(make(), config)
    with pytest.raises(ValueError, match="'default' trains biases already"):
        model.add_adapter("b", config)
    with pytest.raises(ValueError, match="'a' trains biases already"):
        BoneModel(make(), {"a": config, "b": config}, "a")


def test_biases_of_a_copy_are_the_copys() -> None:
    config = BoneConfig(r=4, target_modules=["lin0"], modules_to_save=["lin1"], bias="all")
    model = BoneModel(make(), config)
    names = {name for name in _trained(model) if "bias" in name}
    assert names == {
        "model.lin0.base_layer.bias",
        "model.norm.bias",
        "model.lin1.modules_to_save.default.bias",
    }


def test_training_biases_moves_them() -> None:
    config = BoneConfig(r=4, target_modules=["lin0"], bias="all")
    model = BoneModel(MLP(), config)
    before = model.model.norm.bias.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(batch()).square().sum()
    with torch.no_grad(), model.disable_adapters():
        model(batch())
    loss.backward()
    optimizer.step()
    assert not torch.equal(model.model.norm.bias, before)


def test_a_model_whose_embeddings_are_replaced_still_has_them() -> None:
    config = BoneConfig(r=4, target_modules=["up"], modules_to_save=["embed"])
    model = BoneModel(make(Deep), config)
    stir(model)
    adapted = model(ids())
    assert model.model.embed.num_embeddings == 20
    assert not torch.equal(adapted, make(Deep)(ids()))
    torch.testing.assert_close(model.merge_and_unload()(ids()), adapted, rtol=1e-5, atol=1e-5)
