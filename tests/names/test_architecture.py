"""What a configuration tells of a model's names, and configurations that tell nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from boneconv.errors import MissingExtraError, NameMatchError
from boneconv.names import resolve, tied_names, trained_on
from tests.names.checkpoints import GROUPED, Base


def test_trained_on_reads_what_peft_writes() -> None:
    library = "transformers.models.bert.modeling_bert"
    mapping = {"base_model_class": "BertForSequenceClassification", "parent_library": library}
    assert trained_on(None, mapping) == ("BertForSequenceClassification",)
    assert trained_on("SEQ_CLS") == ("AutoModelForSequenceClassification",)
    assert trained_on("FEATURE_EXTRACTION", None) == ("AutoModel",)
    assert trained_on("something new") == ()
    assert trained_on() == ()
    assert trained_on(None, {**mapping, "parent_library": "transformers_modules.own"}) == ()
    assert trained_on(None, {}) == ()


# --- configurations that tell nothing --------------------------------------------------------


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(NameMatchError, match=r"other\.weight.*no config\.json") as caught:
        resolve(["other.weight"], ["a.weight"], tmp_path)
    assert caught.value.path == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"model_type": "no such model"}',
        '{"model_type": "llama", "num_hidden_layers": "two"}',
        '{"model_type": "llama", "hidden_size": -8, "num_hidden_layers": 1}',
    ],
)
def test_a_config_that_no_model_can_be_built_from_is_an_input_error(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(NameMatchError, match=r"other\.weight.*transformers 5\.\d+.*cannot build"):
        resolve(["other.weight"], ["a.weight"], tmp_path)


@pytest.mark.parametrize("model_type", ["strange", "llama"])
def test_code_in_a_checkpoint_is_never_run(model_type: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: ...\nclass M: ...\n")
    auto_map = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoModelForCausalLM": "own.M"}
    config = {**GROUPED, "model_type": model_type, "architectures": ["M"], "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted, disk = ["model.layers.0.mlp.up_proj.weight"], ["layers.0.mlp.up_proj.weight"]
    classes = ["AutoModelForCausalLM", "AutoModel"]
    if model_type == "llama":
        resolution = resolve(wanted, disk, tmp_path, architectures=classes)
        assert resolution.found == dict(zip(wanted, disk, strict=True))
    else:
        with pytest.raises(NameMatchError, match="cannot build"):
            resolve(wanted, disk, tmp_path, architectures=classes)
    assert not mark.exists()


def test_a_transformers_without_the_needed_parts_is_named(
    base: Callable[[str], Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from transformers import core_model_loading

    saved = base("vit")
    monkeypatch.delattr(core_model_loading, "rename_source_key")
    version = transformers.__version__
    with pytest.raises(MissingExtraError, match=f"transformers {version} .*rename_source_key"):
        resolve(list(saved.linear_tensors()), list(saved.tensors), saved.folder)


def test_the_library_keeps_its_log_level(base: Callable[[str], Base]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        tied_names(base("llama").folder)
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)
