"""State dicts, copies, and parameters without memory."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch

from boneconv.config import BoneConfig
from boneconv.errors import ConfigError
from boneconv.nn.model.bone_model import BoneModel
from tests.nn.model.modules import MLP, batch, bone, make, stir
from tests.oracle import models

CONFIGS = {
    "bone": BoneConfig(r=5, target_modules=["lin0", "lin1"], bias="bone_only"),
    "bat": BoneConfig(r=6, target_modules=["lin0"], init_weights="bat", modules_to_save=["lin1"]),
    "miss": BoneConfig(peft_type="MISS", r=4, target_modules=["lin0"], miss_dropout=0.3),
}


def _steps(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, start: int, count: int
) -> list[float]:
    losses = []
    for step in range(start, start + count):
        torch.manual_seed(step)  # dropout
        loss = model(batch(step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    whole = BoneModel(make(), CONFIGS[name]).train()
    expected = _steps(whole, _optimizer(whole), 0, 8)
    assert expected[-1] != expected[0]

    first = BoneModel(make(), CONFIGS[name]).train()
    optimizer = _optimizer(first)
    before = _steps(first, optimizer, 0, 4)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c")

    second = BoneModel(make(seed=99), CONFIGS[name]).train()
    loaded = torch.load(tmp_path / "c", weights_only=True)
    second.load_state_dict(loaded["model"])
    resumed = _optimizer(second)
    resumed.load_state_dict(loaded["optimizer"])
    assert before + _steps(second, resumed, 4, 4) == expected
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["bone", "bat"])
def test_a_run_can_go_on_from_the_adapter_alone(name: str, tmp_path: Path) -> None:
    whole = BoneModel(make(), CONFIGS[name]).train()
    expected = _steps(whole, torch.optim.SGD(whole.parameters(), lr=0.1), 0, 6)
    first = BoneModel(make(), CONFIGS[name]).train()
    before = _steps(first, torch.optim.SGD(first.parameters(), lr=0.1), 0, 3)
    first.save_pretrained(tmp_path)
    second = BoneModel.from_pretrained(make().train(), tmp_path, is_trainable=True)
    after = _steps(second, torch.optim.SGD(second.parameters(), lr=0.1), 3, 3)
    assert before + after == expected


def test_the_names_in_a_state_dict() -> None:
    assert set(bone(CONFIGS["bat"]).state_dict()) == {
        "model.lin0.base_layer.weight",
        "model.lin0.base_layer.bias",
        "model.lin0.bone_block.default",
        "model.norm.weight",
        "model.norm.bias",
        "model.lin1.original_module.weight",
        "model.lin1.original_module.bias",
        "model.lin1.modules_to_save.default.weight",
        "model.lin1.modules_to_save.default.bias",
    }


def test_a_tied_parameter_is_held_once_and_loaded_into_all_its_places(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = BoneConfig(r=4, target_modules=["q_proj"])
    torch.manual_seed(0)
    model = BoneModel(models.llama_tied(), config)
    stir(model)
    state = model.state_dict()
    assert "model.model.embed_tokens.weight" in state
    assert "model.lm_head.weight" not in state
    save_file(state, tmp_path / "state.safetensors")
    for loaded in (load_file(tmp_path / "state.safetensors"), state):
        other = BoneModel(models.llama_tied(), config)
        other.load_state_dict(loaded)
        assert other.model.lm_head.weight is other.model.model.embed_tokens.weight
        inputs = models.token_inputs()
        assert torch.equal(other.eval()(**inputs).logits, model.eval()(**inputs).logits)
    nested = torch.nn.ModuleDict({"inner": model})
    assert set(nested.state_dict()) == {f"inner.{name}" for name in state}
    nested.load_state_dict(nested.state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_are_of_their_own(name: str) -> None:
    model, x = bone(CONFIGS[name]), batch()
    adapted = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert type(other) is type(model)
        assert other.peft_config == model.peft_config
        assert torch.equal(other(x), adapted)
        with other.disable_adapters():
            assert torch.equal(other(x), make()(x))
        other.unload()
        assert torch.equal(model(x), adapted)


# low_cpu_mem_usage


@pytest.mark.parametrize("name", CONFIGS)
def test_new_parameters_take_no_memory_until_they_are_loaded(name: str) -> None:
    config = CONFIGS[name]
    model = BoneModel(make(), config, low_cpu_mem_usage=True)
    meta = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    new = {n for n, _ in model.named_parameters() if "bone_block" in n or "modules_to_save" in n}
    assert meta == new
    full = bone(config)
    model.load_state_dict(full.state_dict(), assign=True)
    assert not [n for n, parameter in model.named_parameters() if parameter.is_meta]
    assert torch.equal(model(batch()), full(batch()))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in full.named_parameters() if p.requires_grad
    }


def test_parameters_without_values_are_not_saved(tmp_path: Path) -> None:
    model = BoneModel(make(), CONFIGS["bat"], low_cpu_mem_usage=True)
    with pytest.raises(ConfigError, match="has no values yet"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_whole_model_without_memory() -> None:
    with torch.device("meta"):
        base = MLP()
    model = BoneModel(base, CONFIGS["bat"])
    assert all(parameter.is_meta for parameter in model.parameters())
    full = bone(CONFIGS["bat"])
    model.load_state_dict(full.state_dict(), assign=True)
    model.eval()
    assert torch.equal(model(batch()), full(batch()))


def test_blocks_of_a_file_go_to_the_device_of_their_layer(tmp_path: Path) -> None:
    bone(CONFIGS["bone"]).save_pretrained(tmp_path)
    model = BoneModel.from_pretrained(make(), tmp_path)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_moving_the_model_moves_the_adapters() -> None:
    model = bone(CONFIGS["bat"]).to(torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    out = model(batch(dtype=torch.float64))
    torch.testing.assert_close(out.float(), bone(CONFIGS["bat"])(batch()), rtol=1e-4, atol=1e-5)


def test_moving_a_model_whose_biases_are_aside() -> None:
    model = bone(CONFIGS["bone"])
    adapted = model(batch())
    with model.disable_adapters():
        model.to(torch.float64)
        torch.testing.assert_close(model(batch()).float(), make()(batch()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(batch()).float(), adapted, rtol=1e-5, atol=1e-5)


def test_gradients_add_up_over_calls() -> None:
    model = BoneModel(make(), CONFIGS["bone"])
    stir(model)
    block = model.model.lin0.bone_block["default"]
    model(batch(1)).sum().backward()
    one = block.grad.clone()
    model(batch(2)).sum().backward()
    both = block.grad.clone()
    block.grad = None
    model(batch(2)).sum().backward()
    torch.testing.assert_close(one + block.grad, both)
