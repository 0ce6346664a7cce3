"""State dicts with and without the base's own parameters."""

from __future__ import annotations

import pytest
import torch

from boneconv.config import BoneConfig
from boneconv.nn.model.bone_model import BoneModel
from tests.nn.model.modules import MLP, batch, make, stir
from tests.oracle import models

CONFIGS = {
    "blocks": BoneConfig(r=4, target_modules=["lin0"]),
    "biases": BoneConfig(r=4, target_modules=["lin0"], bias="all"),
    "copies": BoneConfig(r=4, target_modules=["lin0"], modules_to_save=["lin1"]),
}
NAMES = {
    "blocks": {"model.lin0.bone_block.default"},
    "biases": {
        "model.lin0.bone_block.default",
        "model.lin0.base_layer.bias",
        "model.lin1.bias",
        "model.norm.bias",
    },
    "copies": {
        "model.lin0.bone_block.default",
        "model.lin1.modules_to_save.default.weight",
        "model.lin1.modules_to_save.default.bias",
    },
}


def _small(name: str, seed: int = 0) -> BoneModel:
    model = BoneModel(make(seed=seed), CONFIGS[name])
    model.base_in_state_dict = False
    return model


def test_the_base_is_in_it_by_default() -> None:
    assert BoneModel(make(), CONFIGS["blocks"]).base_in_state_dict
    assert "model.lin0.base_layer.weight" in BoneModel(make(), CONFIGS["blocks"]).state_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_it_holds_what_adapters_train_alone(name: str) -> None:
    model = _small(name)
    stir(model)
    state = model.state_dict()
    assert set(state) == NAMES[name]
    again = _small(name)
    again.load_state_dict(state)
    assert torch.equal(again(batch()), model(batch()))
    nested = torch.nn.ModuleDict({"inner": _small(name)})
    nested.load_state_dict({f"inner.{key}": value for key, value in state.items()})
    assert torch.equal(nested["inner"](batch()), model(batch()))


@pytest.mark.parametrize("name", CONFIGS)
def test_loading_it_leaves_the_base_as_it_is(name: str) -> None:
    model = _small(name)
    stir(model)
    other = _small(name, seed=9)
    other.load_state_dict(model.state_dict())
    with other.disable_adapters():
        assert torch.equal(other.model.lin0.weight, make(seed=9).lin0.weight)
    assert torch.equal(
        other.model.lin0.bone_block["default"], model.model.lin0.bone_block["default"]
    )


def test_a_whole_state_dict_is_loaded_whole() -> None:
    model = BoneModel(make(), CONFIGS["blocks"])
    other = _small("blocks", seed=9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch()), model(batch()))


def test_what_the_adapters_train_must_be_there() -> None:
    with pytest.raises(RuntimeError, match="bone_block"):
        _small("blocks").load_state_dict({})
    state = _small("blocks").state_dict()
    with pytest.raises(RuntimeError, match="base_layer"):
        BoneModel(make(), CONFIGS["blocks"]).load_state_dict(state)


def test_buffers_stay_in_it() -> None:
    class Normed(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(24)

    model = BoneModel(make(Normed), CONFIGS["blocks"])
    model.base_in_state_dict = False
    assert {"model.norm.running_mean", "model.norm.running_var"} < set(model.state_dict())


def test_a_tied_weight_is_left_out_in_all_its_places() -> None:
    model = BoneModel(models.llama_tied(), BoneConfig(r=4, target_modules=["q_proj"]))
    model.base_in_state_dict = False
    state = model.state_dict()
    assert state
    assert all(".bone_block." in name for name in state)
    model.load_state_dict(state)
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
