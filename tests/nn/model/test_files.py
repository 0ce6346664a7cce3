"""Saving and loading: PEFT's layout and the native one, each read by whom it is for."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import boneconv
from boneconv.config import Axis, BoneConfig
from boneconv.errors import (
    ConfigError,
    MachineError,
    MissingPathError,
    NameMatchError,
    ShapeError,
    UsageError,
)
from boneconv.io.hub import ADAPTER, Source
from boneconv.nn.model.bone_model import BoneModel
from tests.nn.model.modules import MLP, Deep, batch, bone, ids, make, stir

BOTH = ["lin0", "lin1"]
CONFIGS: dict[str, BoneConfig] = {
    "bone": BoneConfig(r=5, target_modules=BOTH),
    "random": BoneConfig(r=5, target_modules=BOTH, init_weights=False),
    "bat": BoneConfig(r=6, target_modules=BOTH, init_weights="bat"),
    "miss": BoneConfig(peft_type="MISS", r=5, target_modules=BOTH, miss_dropout=0.1),
    "mini": BoneConfig(peft_type="MISS", r=4, mini_r=3, target_modules=BOTH, init_weights="mini"),
    "regex": BoneConfig(r=4, target_modules=r"lin\d"),
    "linear": BoneConfig(r=4, target_modules="all-linear"),
    "head": BoneConfig(r=4, target_modules=["lin0"], modules_to_save=["lin1"]),
    "biases": BoneConfig(r=4, target_modules=BOTH, bias="bone_only"),
    "miss_biases": BoneConfig(peft_type="MISS", r=4, target_modules=["lin0"], bias="bone_only"),
    "all_biases": BoneConfig(r=4, target_modules=["lin0"], bias="all"),
    "all": BoneConfig(r=4, target_modules=["lin0"], modules_to_save=["lin1"], bias="all"),
}
BAT_IN = BoneConfig(r=3, target_modules=BOTH, init_weights="bat", axis=Axis.IN)


def _saved(folder: Path, config: BoneConfig, **options: Any) -> torch.Tensor:
    """Saves an adapter that does something; what the model gives with it."""
    model = bone(config)
    model.save_pretrained(folder, **options)
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    return model(batch()).detach()


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_what_was_saved(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    expected = _saved(tmp_path, CONFIGS[name], format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(make(), str(tmp_path))
    torch.testing.assert_close(theirs(batch()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*CONFIGS, "bat_in"])
@pytest.mark.parametrize("kind", ["peft", "native", "auto"])
def test_it_is_loaded_again_to_the_bit(name: str, kind: str, tmp_path: Path) -> None:
    config = CONFIGS.get(name, BAT_IN)
    if (name, kind) == ("bat_in", "peft"):
        with pytest.raises(UsageError, match=r'over the output axis.*format="native"'):
            _saved(tmp_path, config, format=kind)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error" if name != "bat_in" else "ignore")
        expected = _saved(tmp_path, config, format=kind)
        model = BoneModel.from_pretrained(make(), tmp_path, "again")
    assert not model.training
    assert not [p for p in model.parameters() if p.requires_grad]
    assert model.active_adapters == ["again"]
    assert torch.equal(model(batch()), expected)
    assert torch.equal(model.unload()(batch()), make()(batch()))


@pytest.mark.parametrize("name", [*CONFIGS, "bat_in"])
def test_the_command_merges_what_was_saved(name: str, tmp_path: Path) -> None:
    save_file(make().state_dict(), tmp_path / "base.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _saved(tmp_path / "adapter", CONFIGS.get(name, BAT_IN))
    out = tmp_path / "out.safetensors"
    boneconv.merge(tmp_path / "base.safetensors", tmp_path / "adapter", out)
    expected = bone(CONFIGS.get(name, BAT_IN)).merge_and_unload().state_dict()
    merged = load_file(out)
    assert set(merged) == set(expected)
    for key, value in expected.items():
        assert torch.equal(merged[key], value), key


@pytest.mark.parametrize("init_weights", [True, "bat"])
def test_an_adapter_of_peft_is_loaded(init_weights: bool | str, tmp_path: Path) -> None:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.BoneConfig(
            r=6, target_modules=["lin0"], modules_to_save=["lin1"], init_weights=init_weights
        )
        theirs = peft.get_peft_model(make(), config).eval()
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.1
        theirs.save_pretrained(tmp_path)
    ours = BoneModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(ours(batch()), theirs(batch()), rtol=1e-5, atol=1e-5)


def test_an_adapter_of_rwkv_is_loaded(tmp_path: Path) -> None:
    block = torch.randn(4, 3, 3) * 0.2
    torch.save({"lin0.disha": block}, tmp_path / "rwkv.pth")
    model = BoneModel.from_pretrained(make(), tmp_path / "rwkv.pth")
    other = BoneModel(make(), BoneConfig(**{**BAT_IN.__dict__, "target_modules": ["lin0"]}))
    other.model.lin0.bone_block["default"].data = block
    assert torch.equal(model(batch()), other(batch()))


def test_ranks_of_a_native_adapter_and_its_strength(tmp_path: Path) -> None:
    from boneconv.config import Variant
    from boneconv.formats.native import Metadata, Module, NativeAdapter, write_native
    from boneconv.io.safetensors import ArrayTensor

    rng = np.random.default_rng(1)
    arrays = {"lin0": rng.normal(size=(3, 24)), "lin1": rng.normal(size=(7, 6))}
    native = NativeAdapter(
        Metadata(Variant.BONE, {"lin0": Module(3), "lin1": Module(7)}, scale=0.3),
        {
            f"base_model.model.{name}.bone_block": ArrayTensor(name, value.astype(np.float32))
            for name, value in arrays.items()
        },
    )
    write_native(native, tmp_path / "a")
    model = BoneModel.from_pretrained(make(), tmp_path / "a")
    save_file(make().state_dict(), tmp_path / "base.safetensors")
    boneconv.merge(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "o.safetensors")
    merged = make()
    merged.load_state_dict(load_file(tmp_path / "o.safetensors"))
    torch.testing.assert_close(model(batch()), merged(batch()), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="one rank for all modules"):
        model.save_pretrained(tmp_path / "b", format="peft")
    with pytest.warns(UserWarning, match="Bone Adapter Format"):
        model.save_pretrained(tmp_path / "b")
    again = BoneModel.from_pretrained(make(), tmp_path / "b")
    assert torch.equal(again(batch()), model(batch()))


def test_loading_to_go_on_training(tmp_path: Path) -> None:
    _saved(tmp_path, CONFIGS["all"])
    model = BoneModel.from_pretrained(MLP(), tmp_path, is_trainable=True)
    assert model.training
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in bone(CONFIGS["all"]).named_parameters() if p.requires_grad}
    assert not model.peft_config["default"].inference_mode


def test_several_adapters_in_folders_of_their_names(tmp_path: Path) -> None:
    model = BoneModel(make(), {"default": CONFIGS["bone"], "other": CONFIGS["bat"]})
    stir(model)
    stir(model, "other", seed=3)
    model.save_pretrained(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "other",
        "other/adapter_config.json",
        "other/adapter_model.safetensors",
    ]
    again = BoneModel.from_pretrained(make(), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    for names in ("default", "other", ["other", "default"]):
        model.set_adapter(names)
        again.set_adapter(names)
        with torch.no_grad():
            assert torch.equal(again(batch()), model(batch()))
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["other"]


def test_convolutions_are_saved_in_the_native_format(tmp_path: Path) -> None:
    model = BoneModel(make(Deep), BoneConfig(r=4, target_modules=["mix", "up"]))
    stir(model)
    with pytest.warns(UserWarning, match="Bone Adapter Format.*convolutions"):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BONE_ADAPTER"
    again = BoneModel.from_pretrained(make(Deep), tmp_path)
    assert torch.equal(again(ids()), model(ids()))


def test_dtypes_are_kept(tmp_path: Path) -> None:
    base = make().to(torch.bfloat16)
    model = BoneModel(copy.deepcopy(base), CONFIGS["bone"], dtype=torch.float32)
    stir(model)
    model.save_pretrained(tmp_path)
    again = BoneModel.from_pretrained(base, tmp_path)
    assert again.model.lin0.bone_block["default"].dtype == torch.float32
    assert torch.equal(again(batch()), model(batch()))


def test_values_of_a_state_dict(tmp_path: Path) -> None:
    model = bone(CONFIGS["all"])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(batch())
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(BoneModel.from_pretrained(make(), tmp_path)(batch()), expected)
    with pytest.raises(ConfigError, match="the state dict lacks a parameter"):
        model.save_pretrained(tmp_path, state_dict={})


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    bone().save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()


# Whole or not at all


def test_saving_again_replaces_the_two_files_alone(tmp_path: Path) -> None:
    _saved(tmp_path, CONFIGS["bat"])
    (tmp_path / "README.md").write_text("mine")
    model = bone(CONFIGS["bone"])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert torch.equal(BoneModel.from_pretrained(make(), tmp_path)(batch()), model(batch()))


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _saved(tmp_path, CONFIGS["bone"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("boneconv.formats.writing.TensorFile.check", fail)
        with pytest.raises(OSError, match="No space"):
            bone(CONFIGS["bat"]).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_crash_between_the_files_never_pairs_weights_with_a_wrong_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _saved(tmp_path, CONFIGS["bone"])

    def crash(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("boneconv.nn.model.saving.os.replace", crash)
        with pytest.raises(KeyboardInterrupt):
            bone(CONFIGS["bat"]).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.safetensors"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError):
        bone().save_pretrained(tmp_path / "file" / "x")


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected auto, peft, native, found 'onnx'"):
        bone().save_pretrained(tmp_path, format="onnx")


# What does not fit


def test_an_adapter_for_another_model(tmp_path: Path) -> None:
    _saved(tmp_path, CONFIGS["bone"])
    base = make(Deep)
    with pytest.raises(NameMatchError, match="2 of the adapter's 2 blocks: lin0, lin1; expected"):
        BoneModel.from_pretrained(base, tmp_path)
    assert set(base.state_dict()) == set(make(Deep).state_dict())
    wider = torch.nn.ModuleDict({"lin0": torch.nn.Linear(12, 25), "lin1": torch.nn.Linear(24, 6)})
    with pytest.raises(ShapeError, match=r"'lin0' does not fit its weight; expected \[5, 25\]"):
        BoneModel.from_pretrained(wider, tmp_path)


def test_a_saved_tensor_without_a_place(tmp_path: Path) -> None:
    _saved(tmp_path, CONFIGS["head"])
    other = torch.nn.ModuleDict({"lin0": torch.nn.Linear(12, 24)})
    with pytest.raises(NameMatchError, match=r"no place for the saved tensor 'lin1\.(bias|weight)"):
        BoneModel.from_pretrained(other, tmp_path)
    other["lin1"] = torch.nn.Linear(24, 7)
    with pytest.raises(ShapeError, match=r"'lin1\.\w+' does not fit the model"):
        BoneModel.from_pretrained(other, tmp_path)


def test_biases_that_the_model_does_not_have(tmp_path: Path) -> None:
    _saved(tmp_path, CONFIGS["biases"])
    base = make(bias=False)
    with pytest.raises(NameMatchError, match=r"no such biases: lin0\.bias, lin1\.bias"):
        BoneModel.from_pretrained(base, tmp_path)
    assert set(base.state_dict()) == set(make(bias=False).state_dict())


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError):
        BoneModel.from_pretrained(make(), tmp_path / "absent")
    model = bone()
    with pytest.raises(ConfigError, match="no name for a new adapter"):
        model.load_adapter(tmp_path, "default")


def test_an_adapter_of_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _saved(tmp_path, CONFIGS["bone"])
    asked: list[object] = []

    def fetch(given: Any, wanted: Any) -> Source:
        asked.append((given, wanted))
        return Source(given, tmp_path, "owner/name", "0" * 40)

    monkeypatch.setattr("boneconv.formats.locate", fetch)
    model = BoneModel.from_pretrained(make(), "owner/name@v1")
    assert asked == [("owner/name@v1", ADAPTER)]
    assert torch.equal(model(batch()), expected)


def test_a_file_of_peft_with_biases_that_it_did_not_save(tmp_path: Path) -> None:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            make(), peft.BoneConfig(r=4, target_modules=["lin0"], bias="all")
        )  # fmt: skip
        theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="bias 'all', and the file holds none"):
        model = BoneModel.from_pretrained(make(), tmp_path)
    assert torch.equal(model(batch()), make()(batch()))


def test_a_weight_below_a_block(tmp_path: Path) -> None:
    expected = _saved(tmp_path, CONFIGS["bone"])
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.lin0.base_layer.weight"] = make().lin0.weight.detach()
    save_file(tensors, weights)
    assert torch.equal(BoneModel.from_pretrained(make(), tmp_path)(batch()), expected)
    tensors["base_model.model.lin0.base_layer.weight"] = make().lin0.weight.detach() + 1
    save_file(tensors, weights)
    with pytest.raises(ConfigError, match=r"brings 'lin0\.weight', which lies below a block"):
        BoneModel.from_pretrained(make(), tmp_path)
