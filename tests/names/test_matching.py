"""Adapter names and the tensors of a checkpoint, matched one to one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.errors import MissingExtraError, NameMatchError
from boneconv.names import DIRECT, disk_name, resolve, tied_names
from boneconv.names.architecture import Architecture
from tests.names.checkpoints import BY_RENAME, MODELS, TIES, VISION, Base

# --- direct matches --------------------------------------------------------------------------

NAMES = st.sets(st.from_regex(r"[a-c](\.[0-2]){0,2}\.weight", fullmatch=True), max_size=8)


@given(wanted=NAMES, on_disk=NAMES)
def test_without_a_config_names_are_matched_as_they_stand(
    wanted: set[str], on_disk: set[str]
) -> None:
    resolution = resolve(wanted, on_disk, None)
    assert resolution.found == {name: name for name in wanted & on_disk}
    assert resolution.missing == tuple(sorted(wanted - on_disk))
    assert resolution.via == DIRECT


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.mark.usefixtures("no_transformers")
def test_names_that_match_directly_need_no_transformers(tmp_path: Path) -> None:
    resolution = resolve(["a.weight", "b.weight"], ["b.weight", "a.weight", "c.weight"], tmp_path)
    assert resolution.found == {"a.weight": "a.weight", "b.weight": "b.weight"}
    assert (resolution.missing, resolution.via) == ((), DIRECT)
    assert disk_name("a.weight", ["a.weight"], tmp_path) == "a.weight"


@pytest.mark.usefixtures("no_transformers")
def test_other_names_say_how_to_install_transformers(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"other\.weight.*boneconv\[transformers\]"):
        resolve(["a.weight", "other.weight"], ["a.weight"], tmp_path)
    with pytest.raises(MissingExtraError, match=r"boneconv\[transformers\]"):
        disk_name("other.weight", ["a.weight"], tmp_path)
    with pytest.raises(MissingExtraError, match=r"boneconv\[transformers\]"):
        tied_names(tmp_path)


@pytest.mark.usefixtures("no_transformers")
def test_optional_names_do_not_ask_transformers(tmp_path: Path) -> None:
    resolution = resolve(["a.weight", "h.weight"], ["a.weight"], tmp_path, optional=["h.weight"])
    assert resolution.found == {"a.weight": "a.weight"}
    assert (resolution.missing, resolution.via) == (("h.weight",), DIRECT)


def test_direct_matches_import_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from boneconv.names import module_key, resolve\n"
        "assert resolve(['a.weight'], ['a.weight'], Path(sys.argv[1])).via == 'direct'\n"
        "assert module_key('base_model.model.a.weight') == 'a.weight'\n"
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --- what transformers renames ---------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_is_found_by_its_content(name: str, base: Callable[[str], Base]) -> None:
    import torch

    saved = base(name)
    wanted = saved.linear_tensors()
    resolution = resolve(list(wanted), list(saved.tensors), saved.folder)
    tied = set(TIES.get(name, {})) & set(wanted)
    assert set(resolution.missing) == tied
    assert set(resolution.found) == set(wanted) - tied
    assert len(set(resolution.found.values())) == len(resolution.found)
    for module_tensor, disk_tensor in resolution.found.items():
        assert torch.equal(wanted[module_tensor], saved.tensors[disk_tensor]), module_tensor
    assert (resolution.via == DIRECT) == (name not in BY_RENAME and not tied)
    assert any(key != value for key, value in resolution.found.items()) == (name in BY_RENAME)


@pytest.mark.parametrize("name", MODELS)
def test_a_tensor_taken_off_a_checkpoint_gets_its_name_back(
    name: str, base: Callable[[str], Base]
) -> None:
    saved = base(name)
    wanted = sorted(saved.model.state_dict())
    if name == "mixtral":
        wanted = [key for key in wanted if "experts" not in key]
    whole = resolve(wanted, list(saved.tensors), saved.folder).found
    for parameter, disk_tensor in list(whole.items())[:: max(1, len(whole) // 12)]:
        rest = [key for key in saved.tensors if key != disk_tensor]
        assert disk_name(parameter, rest, saved.folder) == disk_tensor


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_in_the_model_s_own_names_is_matched_as_it_stands(
    name: str, base: Callable[[str], Base]
) -> None:
    saved = base(name)
    own = sorted(set(saved.model.state_dict()) - set(TIES.get(name, {})))
    resolution = resolve([*own, "nowhere.weight"], own, saved.folder)
    assert resolution.found == {key: key for key in own}
    assert resolution.missing == ("nowhere.weight",)


@pytest.mark.parametrize("name", MODELS)
def test_tied_names_are_those_that_the_config_ties(name: str, base: Callable[[str], Base]) -> None:
    saved = base(name)
    ties = tied_names(saved.folder)
    assert ties == TIES.get(name, {})
    parameters = dict(saved.model.named_parameters(remove_duplicate=False))
    assert all(parameters[tied] is parameters[source] for tied, source in ties.items())


def test_the_config_may_be_named_itself(base: Callable[[str], Base]) -> None:
    saved = base("llama tied")
    assert tied_names(saved.folder / "config.json") == TIES["llama tied"]


def test_a_changed_config_is_read_anew(tmp_path: Path, base: Callable[[str], Base]) -> None:
    config = json.loads((base("llama tied").folder / "config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert tied_names(file) == TIES["llama tied"]
    file.write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert tied_names(file) == {}


@pytest.mark.parametrize("name", ["gpt-neox", "vit", "llava"])
def test_names_of_the_checkpoint_itself_are_taken_beside_renamed_ones(
    name: str, base: Callable[[str], Base]
) -> None:
    saved = base(name)
    whole = resolve(list(saved.linear_tensors()), list(saved.tensors), saved.folder).found
    renamed = sorted(key for key, value in whole.items() if key != value)
    old_style = {whole[key] for key in renamed[1:]}
    mixed = resolve([renamed[0], *old_style], list(saved.tensors), saved.folder)
    assert mixed.found == {renamed[0]: whole[renamed[0]], **{key: key for key in old_style}}


@pytest.mark.parametrize(
    "classes", [(), ("BertForSequenceClassification",), ("AutoModelForSequenceClassification",)]
)
def test_a_model_with_a_head_over_a_checkpoint_without_prefix(
    classes: tuple[str, ...], base: Callable[[str], Base]
) -> None:
    bare = base("bert bare")
    wanted = {f"bert.{key}": key for key in bare.linear_tensors()}
    found = resolve(list(wanted), list(bare.tensors), bare.folder, architectures=classes)
    assert found.found == wanted


def test_a_model_without_a_head_over_a_checkpoint_with_prefix(base: Callable[[str], Base]) -> None:
    masked = base("bert masked")
    wanted = {
        key.removeprefix("bert."): key for key in masked.linear_tensors() if key.startswith("bert.")
    }
    for classes in ((), ("BertModel",), ("NoSuchClass", "os", "LlamaModel")):
        found = resolve(list(wanted), list(masked.tensors), masked.folder, architectures=classes)
        assert found.found == wanted


def test_names_that_look_alike_are_told_apart(base: Callable[[str], Base]) -> None:
    llava = base("llava")
    disk = {
        key.replace("layers.1.", f"layers.{layer}.")
        for key in llava.tensors
        for layer in (1, 11, 111)
    }
    gone = "language_model.model.layers.1.self_attn.q_proj.weight"
    wanted = [f"model.language_model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1, 11, 111)]
    wanted += ["model.vision_tower.encoder.layers.1.self_attn.q_proj.weight", "q_proj.weight"]
    resolution = resolve(wanted, disk - {gone}, llava.folder)
    assert resolution.found == {
        "model.language_model.layers.0.self_attn.q_proj.weight": gone.replace(".1.", ".0."),
        "model.vision_tower.encoder.layers.1.self_attn.q_proj.weight": (
            resolve(wanted[-2:-1], list(llava.tensors), llava.folder).found[wanted[-2]]
        ),
    }
    assert set(resolution.missing) == set(wanted) - set(resolution.found)


def test_two_tensors_for_one_name_are_an_error(base: Callable[[str], Base]) -> None:
    neox = base("gpt-neox")
    assert resolve(["lm_head.weight"], list(neox.tensors), neox.folder).found == {
        "lm_head.weight": "embed_out.weight"
    }
    first = "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"
    twice = [*neox.tensors, first.removeprefix("gpt_neox.")]
    with pytest.raises(NameMatchError, match="several tensors") as caught:
        resolve(["lm_head.weight", first], twice, neox.folder)
    assert first in str(caught.value)
    assert f" {first.removeprefix('gpt_neox.')}" in str(caught.value)


def test_two_names_for_one_tensor_are_an_error(base: Callable[[str], Base]) -> None:
    neox = base("gpt-neox")
    with pytest.raises(NameMatchError, match=r"one tensor embed_out\.weight") as caught:
        resolve(["lm_head.weight", "embed_out.weight"], list(neox.tensors), neox.folder)
    assert "lm_head.weight" in str(caught.value)


def test_a_weight_that_is_stacked_on_load_is_an_error(base: Callable[[str], Base]) -> None:
    mixtral = base("mixtral")
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(NameMatchError, match="another layout") as caught:
        resolve([fused], list(mixtral.tensors), mixtral.folder)
    for part in ("experts.0.w1", "experts.1.w1", "experts.0.w3", "experts.1.w3"):
        assert f"model.layers.0.block_sparse_moe.{part}.weight" in str(caught.value)
    assert "layers.1" not in str(caught.value)
    assert "w2" not in str(caught.value)
    with pytest.raises(NameMatchError, match="another layout"):
        disk_name(fused, list(mixtral.tensors), mixtral.folder)


def test_a_single_expert_named_as_on_disk_is_taken(base: Callable[[str], Base]) -> None:
    mixtral = base("mixtral")
    expert = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    resolution = resolve(
        [expert, gate, "model.layers.0.mlp.gate.bias"], list(mixtral.tensors), mixtral.folder
    )
    assert resolution.found == {expert: expert, gate: gate}
    assert resolution.missing == ("model.layers.0.mlp.gate.bias",)


def test_a_weight_that_is_split_on_load_is_an_error(tmp_path: Path) -> None:
    config = {"model_type": "dinov2", "use_swiglu_ffn": True, "num_hidden_layers": 1, **VISION}
    (tmp_path / "config.json").write_text(json.dumps(config))
    fused = "encoder.layer.0.mlp.weights_in.weight"
    for part in ("gate_proj", "up_proj"):
        wanted = _only_parameter_ending(f"0.mlp.{part}.weight", tmp_path)
        with pytest.raises(NameMatchError, match="another layout") as caught:
            resolve([wanted], [fused], tmp_path)
        assert fused in str(caught.value)


def _only_parameter_ending(ending: str, folder: Path) -> str:
    import torch
    import transformers as tf

    with torch.device("meta"):
        model = tf.AutoModel.from_config(tf.AutoConfig.from_pretrained(folder))
    (name,) = (key for key in model.state_dict() if key.endswith(ending))
    return str(name)


# --- tensors that are added ------------------------------------------------------------------


def _add_and_load(
    saved: Base, added: dict[str, Any], folder: Path, model_class: str, changes: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Loads a copy of a base with more tensors and a changed config; and the loading report."""
    import transformers as tf
    from safetensors.torch import save_file

    shutil.copytree(saved.folder, folder)
    tensors = {**saved.tensors, **added}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    model, report = getattr(tf, model_class).from_pretrained(folder, output_loading_info=True)
    return model, report


UNTIED = {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("name", "model_class", "shapes", "names_on_disk", "changes"),
    [
        (
            "bert bare",
            "BertForSequenceClassification",
            {"classifier.weight": (2, 32), "classifier.bias": (2,)},
            ["classifier.weight", "classifier.bias"],
            {},
        ),
        (
            "llama tied",
            "LlamaForCausalLM",
            {"lm_head.weight": (40, 32)},
            ["lm_head.weight"],
            UNTIED,
        ),
        ("llama bare", "LlamaForCausalLM", {"lm_head.weight": (40, 32)}, ["lm_head.weight"], {}),
        ("opt", "OPTForCausalLM", {"lm_head.weight": (40, 16)}, ["lm_head.weight"], UNTIED),
        (
            "gpt-neox bare",
            "GPTNeoXForCausalLM",
            {"lm_head.weight": (40, 32)},
            ["embed_out.weight"],
            {},
        ),
        (
            "llava tied",
            "LlavaForConditionalGeneration",
            {"lm_head.weight": (40, 32)},
            ["language_model.lm_head.weight"],
            UNTIED,
        ),
        ("t5", "T5ForConditionalGeneration", {"lm_head.weight": (40, 32)}, ["lm_head.weight"], {}),
    ],
)
def test_an_added_tensor_is_loaded_under_its_disk_name(
    name: str,
    model_class: str,
    shapes: dict[str, tuple[int, ...]],
    names_on_disk: list[str],
    changes: dict[str, Any],
    tmp_path: Path,
    base: Callable[[str], Base],
) -> None:
    import torch

    saved = base(name)
    added: dict[str, Any] = {}
    for wanted in shapes:
        on_disk = [*saved.tensors, *added]
        new = disk_name(wanted, on_disk, saved.folder, architectures=[model_class])
        assert new not in on_disk
        added[new] = torch.randn(shapes[wanted])
    assert list(added) == names_on_disk
    model, report = _add_and_load(saved, added, tmp_path / "out", model_class, changes)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for wanted, new in zip(shapes, added, strict=True):
        assert torch.equal(model.get_parameter(wanted), added[new])
    again = resolve(
        list(shapes), [*saved.tensors, *added], tmp_path / "out", architectures=[model_class]
    )
    assert again.found == dict(zip(shapes, added, strict=True))


def test_a_name_that_transformers_would_not_load_is_passed_over(
    base: Callable[[str], Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = base("bert bare")
    first_guesses = ["nowhere.weight", "pooler.dense.weight", "bert.pooler.dense.bias"]
    monkeypatch.setattr(Architecture, "saved_as", lambda *_: iter(first_guesses))
    head = ["BertForSequenceClassification"]
    name = disk_name("classifier.weight", list(bare.tensors), bare.folder, architectures=head)
    assert name == "classifier.weight"


def test_a_name_that_is_on_disk_under_another_is_not_added_again(
    base: Callable[[str], Base],
) -> None:
    neox = base("gpt-neox")
    disk = list(neox.tensors)
    skipped = resolve(["lm_head.weight"], disk, neox.folder, optional=["lm_head.weight"])
    assert skipped.missing == ("lm_head.weight",)
    assert disk_name("lm_head.weight", disk, neox.folder) == "embed_out.weight"


def test_an_added_name_has_the_prefix_that_the_checkpoint_has(base: Callable[[str], Base]) -> None:
    bare, masked = base("bert bare"), base("bert masked")
    pooler = "pooler.dense.weight"
    rest = [key for key in bare.tensors if key != pooler]
    head = ["BertForSequenceClassification"]
    assert disk_name(f"bert.{pooler}", rest, bare.folder, architectures=head) == pooler
    names = list(masked.tensors)
    assert disk_name(pooler, names, masked.folder, architectures=["BertModel"]) == f"bert.{pooler}"


def test_the_config_s_class_is_asked_where_the_preferred_one_has_no_such_head(
    base: Callable[[str], Base],
) -> None:
    saved = base("bert classifier")
    rest = [key for key in saved.tensors if key != "classifier.weight"]
    name = disk_name("classifier.weight", rest, saved.folder, architectures=["BertModel"])
    assert name == "classifier.weight"


def test_a_head_that_no_known_class_has_gets_no_name(base: Callable[[str], Base]) -> None:
    bare = base("bert bare")
    with pytest.raises(NameMatchError, match=r"no parameter classifier\.weight"):
        disk_name("classifier.weight", list(bare.tensors), bare.folder)


def test_without_a_config_there_is_no_name_for_an_added_tensor() -> None:
    with pytest.raises(NameMatchError, match=r"without a config\.json"):
        disk_name("lm_head.weight", ["a.weight"], None)
