"""BoneConfig: every field of PEFT's Bone and MiSS configurations, and values that cannot be."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.config import CONFIG_NAME, Axis, BoneConfig, Variant
from boneconv.errors import (
    BoneconvError,
    ConfigError,
    FormatError,
    MachineError,
    MissingPathError,
    NotABoneAdapterError,
)

#: All fields, none at its default.
FULL: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "peft_type": "BONE",
    "auto_mapping": {"base_model_class": "LlamaModel", "parent_library": "transformers"},
    "base_model_name_or_path": "owner/base",
    "revision": "main",
    "inference_mode": True,
    "r": 16,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["lm_head"],
    "init_weights": "bat",
    "layers_to_transform": [0, 2],
    "layers_pattern": ["layers"],
    "bias": "all",
    "modules_to_save": ["classifier"],
}


def _config(**values: Any) -> BoneConfig:
    return BoneConfig.from_dict({"peft_type": "BONE"} | values, "adapter_config.json")


def test_every_field_of_peft_is_parsed_and_kept() -> None:
    config = BoneConfig.from_dict(FULL)
    assert config.unknown == {}
    for name, value in FULL.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(config, name) == expected, name


def test_the_fields_stand_in_the_order_of_peft() -> None:
    names = [field.name for field in fields(BoneConfig)]
    assert names[: len(FULL)] == list(FULL)


def test_the_defaults_are_those_of_peft() -> None:
    config = _config()
    assert (config.r, config.init_weights, config.bias) == (64, True, "none")
    assert config.inference_mode is False
    absent = set(FULL) - {"peft_type", "r", "init_weights", "bias", "inference_mode"}
    assert all(getattr(config, name) is None for name in absent)
    assert (config.mini_r, config.miss_dropout, config.axis) == (1, 0.0, Axis.OUT)


def test_the_fields_of_miss() -> None:
    config = _config(
        peft_type="MISS", init_weights="mini", mini_r=8, miss_dropout=0.1, bias="MiSS_only"
    )
    assert (config.mini_r, config.miss_dropout, config.bias) == (8, 0.1, "bone_only")
    assert config.variant is Variant.MINI


def test_unknown_fields_are_kept_as_they_stood() -> None:
    strange = {"lora_alpha": 16, "unknown": {"nested": [1, None]}}
    assert _config(**strange).unknown == strange


@pytest.mark.parametrize(
    ("init", "variant"),
    [(True, Variant.BONE), (False, Variant.BONE), ("bat", Variant.BAT)],
)
def test_init_weights_is_the_variant(init: bool | str, variant: Variant) -> None:
    assert _config(init_weights=init).variant is variant


def test_names_may_be_a_list_or_a_regular_expression() -> None:
    assert _config(target_modules=["b", "a"]).target_modules == ("b", "a")
    assert _config(target_modules=r".*\.q").target_modules == r".*\.q"
    assert BoneConfig(target_modules={"b", "a"}).target_modules == ("a", "b")  # type: ignore[arg-type]


def test_layers_may_be_one_index_or_several() -> None:
    assert _config(layers_to_transform=3).layers_to_transform == 3
    assert _config(layers_to_transform=[3, 4]).layers_to_transform == (3, 4)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"r": 0}, "r must be a positive integer"),
        ({"r": -4}, "r must be a positive integer"),
        ({"r": True}, "r must be a positive integer"),
        ({"r": "64"}, "r must be a positive integer"),
        ({"r": 64.0}, "r must be a positive integer"),
        ({"r": None}, "r must be a positive integer"),
        ({"mini_r": 0}, "mini_r must be a positive integer"),
        ({"init_weights": "Bat"}, "init_weights names no variant"),
        ({"init_weights": None}, "init_weights names no variant"),
        ({"init_weights": 1}, "init_weights names no variant"),
        ({"init_weights": ["bat"]}, "init_weights names no variant"),
        ({"init_weights": "mini"}, "exists for MiSS only"),
        ({"bias": "some"}, "bias has an unknown value"),
        ({"bias": None}, "bias has an unknown value"),
        ({"bias": ["all"]}, "bias has an unknown value"),
        ({"bias": {}}, "bias has an unknown value"),
        ({"target_modules": 3}, "target_modules holds no names"),
        ({"target_modules": ["q", 3]}, "target_modules holds no names"),
        ({"target_modules": {"q": 1}}, "target_modules holds no names"),
        ({"exclude_modules": [None]}, "exclude_modules holds no names"),
        ({"layers_pattern": 1}, "layers_pattern holds no names"),
        ({"modules_to_save": "head"}, "modules_to_save holds no names"),
        ({"layers_to_transform": "0"}, "layers_to_transform holds no layer index"),
        ({"layers_to_transform": [0, True]}, "layers_to_transform holds no layer index"),
        ({"layers_to_transform": [0.5]}, "layers_to_transform holds no layer index"),
        ({"target_modules": "q", "layers_to_transform": [0]}, "layers_to_transform cannot be used"),
        ({"target_modules": "q", "layers_pattern": "h"}, "layers_pattern cannot be used"),
        ({"task_type": 1}, "task_type is no text"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is no text"),
        ({"revision": 1.0}, "revision is no text"),
        ({"peft_version": 18}, "peft_version is no text"),
        ({"auto_mapping": "LlamaModel"}, "auto_mapping is no object"),
        ({"miss_dropout": 1.5}, "miss_dropout is no probability"),
        ({"miss_dropout": "0"}, "miss_dropout is no probability"),
        ({"miss_dropout": None}, "miss_dropout is no probability"),
        ({"axis": "sideways"}, "axis"),
        ({"axis": 0}, "axis"),
        ({"axis": []}, "axis"),
    ],
)
def test_values_that_cannot_be(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(**values)
    assert says in caught.value.message
    assert caught.value.path == "adapter_config.json"


JSON_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON_VALUES = (
    JSON_SCALARS
    | st.lists(JSON_SCALARS, max_size=3)
    | st.dictionaries(st.text(max_size=3), JSON_SCALARS, max_size=2)
)


@given(
    st.dictionaries(st.sampled_from([f.name for f in fields(BoneConfig)]), JSON_VALUES, max_size=4)
)
def test_no_json_value_gives_anything_but_a_config_or_an_error_of_ours(
    values: dict[str, Any],
) -> None:
    try:
        config = BoneConfig.from_dict({"peft_type": "BONE"} | values)
    except BoneconvError:
        return
    assert config.r > 0
    assert config.variant in Variant


@pytest.mark.parametrize("peft_type", [None, "LORA", "bone", 3, ["BONE"], {"a": 1}])
def test_another_method_is_no_bone_adapter(peft_type: object) -> None:
    with pytest.raises(NotABoneAdapterError, match="expected peft_type BONE or MISS"):
        BoneConfig.from_dict({"peft_type": peft_type, "r": 8}, "x")


def test_a_config_without_peft_type_says_so() -> None:
    with pytest.raises(NotABoneAdapterError, match="found no peft_type"):
        BoneConfig.from_dict({"r": 8})


def test_another_method_is_told_where_to_go() -> None:
    with pytest.raises(NotABoneAdapterError, match="Merge LORA adapters with the library"):
        BoneConfig.from_dict({"peft_type": "LORA"})


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        _config().r = 3  # type: ignore[misc]


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps(FULL))
    assert BoneConfig.from_file(path) == BoneConfig.from_dict(FULL)
    path.write_text("{")
    with pytest.raises(FormatError, match=r"adapter_config\.json: not a JSON file"):
        BoneConfig.from_file(path)


def test_to_dict_is_in_the_order_and_the_spelling_of_peft() -> None:
    assert list(BoneConfig.from_dict(FULL).to_dict().items()) == list(FULL.items())


def test_what_only_miss_and_the_native_format_have_is_said_where_it_says_something() -> None:
    assert set(BoneConfig().to_dict()) == set(FULL)
    miss = BoneConfig(peft_type="MISS", bias="bone_only").to_dict()
    assert set(miss) == {*FULL, "mini_r", "miss_dropout"}
    assert miss["bias"] == "MiSS_only"
    assert BoneConfig(axis=Axis.IN).to_dict()["axis"] == "in"
    assert BoneConfig(mini_r=4).to_dict()["mini_r"] == 4


def test_a_file_is_what_peft_writes(tmp_path: Path) -> None:
    from peft import BoneConfig as PeftBoneConfig

    config = _config(r=8, target_modules=["k"], init_weights="bat", peft_version="0.18.1")
    config.to_file(tmp_path / CONFIG_NAME)
    theirs = PeftBoneConfig(r=8, target_modules=["k"], init_weights="bat", inference_mode=False)
    theirs.save_pretrained(tmp_path / "theirs")
    written = (tmp_path / CONFIG_NAME).read_text()
    expected = json.loads((tmp_path / "theirs" / CONFIG_NAME).read_text())
    assert json.loads(written) == expected | {"inference_mode": False}
    assert list(json.loads(written)) == sorted(expected)
    assert PeftBoneConfig.from_pretrained(tmp_path).r == 8


names = st.lists(st.text(min_size=1, max_size=4), max_size=3).map(tuple)


@given(
    st.builds(
        BoneConfig,
        peft_type=st.sampled_from(["BONE", "MISS"]),
        r=st.integers(1, 99),
        target_modules=st.none() | names,
        exclude_modules=st.none() | names | st.text(),
        init_weights=st.sampled_from([True, False, "bat"]),
        layers_to_transform=st.none() | st.integers(0, 9) | st.just((1, 2)),
        layers_pattern=st.none() | st.just("layers") | names,
        bias=st.sampled_from(["none", "all", "bone_only"]),
        modules_to_save=st.none() | names,
        mini_r=st.integers(1, 9),
        miss_dropout=st.floats(0, 1),
        axis=st.sampled_from(Axis),
        peft_version=st.none() | st.just("0.18.1"),
        unknown=st.dictionaries(st.just("alien"), st.integers()),
    )
)
def test_to_dict_and_from_dict_are_inverse(config: BoneConfig) -> None:
    assert BoneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_to_file_and_from_file_are_inverse(tmp_path: Path) -> None:
    config = BoneConfig.from_dict(FULL | {"alien": "Grüße"})
    config.to_file(tmp_path / CONFIG_NAME)
    BoneConfig(r=1).to_file(tmp_path / CONFIG_NAME)
    config.to_file(tmp_path / CONFIG_NAME)
    assert BoneConfig.from_file(tmp_path / CONFIG_NAME) == config
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG_NAME]


def test_a_file_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).mkdir()
    with pytest.raises(MachineError, match=r"[Ii]s a directory"):
        BoneConfig().to_file(tmp_path / CONFIG_NAME)
    with pytest.raises(MissingPathError, match="no such folder"):
        BoneConfig().to_file(tmp_path / "absent" / CONFIG_NAME)
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG_NAME]
    with pytest.raises(ConfigError, match="the configuration is no JSON"):
        BoneConfig(auto_mapping={"base": Path()}).to_file(tmp_path / "other.json")
