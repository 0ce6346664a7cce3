"""config.json: what a merge changes in it, and that it changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from boneconv.errors import ConfigError, FormatError
from boneconv.planning.config_edits import ConfigEdits


def _edits(tmp_path: Path, values: Any) -> ConfigEdits:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return ConfigEdits(path)


NESTED = {
    "architectures": ["LlavaForConditionalGeneration"],
    "tie_word_embeddings": True,
    "text_config": {"vocab_size": 32, "torch_dtype": "float16", "hidden_size": 12},
    "vision_config": {"hidden_size": 8, "dtype": "float16"},
}


def test_nothing_changed(tmp_path: Path) -> None:
    edits = _edits(tmp_path, NESTED)
    assert not edits.changed
    assert edits.values == NESTED
    assert json.loads(edits.encode()) == NESTED


def test_the_order_of_keys_and_the_layout_of_transformers(tmp_path: Path) -> None:
    edits = _edits(tmp_path, {"b": 1, "a": {"é": [1]}})
    assert edits.encode().decode() == '{\n  "b": 1,\n  "a": {\n    "é": [\n      1\n    ]\n  }\n}\n'


def test_every_dtype_that_is_named_is_changed(tmp_path: Path) -> None:
    edits = _edits(tmp_path, NESTED | {"dtype": "float16"})
    edits.set_dtype("bfloat16")
    assert edits.changed
    assert edits.values["dtype"] == "bfloat16"
    assert "torch_dtype" not in edits.values
    assert edits.values["text_config"]["torch_dtype"] == "bfloat16"
    assert edits.values["vision_config"]["dtype"] == "bfloat16"


def test_a_dtype_that_is_not_named_is_added(tmp_path: Path) -> None:
    edits = _edits(tmp_path, {"hidden_size": 3})
    edits.set_dtype("float32")
    assert edits.values == {"hidden_size": 3, "torch_dtype": "float32"}


def test_a_diffusers_model_s_configuration_says_nothing_of_dtypes(tmp_path: Path) -> None:
    edits = _edits(tmp_path, {"_class_name": "UNet", "_diffusers_version": "0.42.1"})
    assert edits.is_diffusers
    edits.set_dtype("float32")
    assert not edits.changed
    assert not _edits(tmp_path, {"hidden_size": 3}).is_diffusers


@pytest.mark.parametrize(
    "values",
    [{}, {"tie_word_embeddings": True}, {"text_config": {"vocab_size": 3}}, NESTED],
    ids=str,
)
def test_untying_is_said_wherever_there_is_a_vocabulary(tmp_path: Path, values: Any) -> None:
    edits = _edits(tmp_path, values)
    assert not edits.says_untied
    edits.untie()
    assert edits.says_untied
    assert edits.values["tie_word_embeddings"] is False
    text = edits.values.get("text_config", {"tie_word_embeddings": False})
    assert text["tie_word_embeddings"] is False
    assert "tie_word_embeddings" not in edits.values.get("vision_config", {})


def test_a_resized_vocabulary_is_changed_where_it_had_the_old_size(tmp_path: Path) -> None:
    values = {
        "vocab_size": 40,
        "text_config": {"vocab_size": 32},
        "audio_config": {"vocab_size": 9},
    }
    edits = _edits(tmp_path, values)
    assert edits.vocabulary_sizes() == {40, 32, 9}
    edits.resize_vocabulary(32, 34)
    assert edits.vocabulary_sizes() == {40, 34, 9}


def test_a_vocabulary_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected vocab_size 32, found \[40\]"):
        _edits(tmp_path, {"vocab_size": 40}).resize_vocabulary(32, 34)


@pytest.mark.parametrize("size", [None, "32", [32], {}, 1.5])
def test_a_vocabulary_size_that_is_no_number(tmp_path: Path, size: Any) -> None:
    edits = _edits(tmp_path, {"vocab_size": size, "text_config": {"vocab_size": 8}})
    assert edits.vocabulary_sizes() == {8}
    with pytest.raises(ConfigError):
        edits.resize_vocabulary(32, 34)


@pytest.mark.parametrize(
    "values",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"quantization_config": {}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ],
    ids=str,
)
def test_a_quantised_base_is_refused(tmp_path: Path, values: Any) -> None:
    with pytest.raises(FormatError, match=r"the base is quantised.*full-precision checkpoint"):
        _edits(tmp_path, values).refuse_quantised()


def test_no_quantisation(tmp_path: Path) -> None:
    _edits(tmp_path, NESTED | {"quantization_config": None}).refuse_quantised()


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(FormatError, match=r"config\.json: not a JSON file"):
        ConfigEdits(tmp_path / "config.json")
