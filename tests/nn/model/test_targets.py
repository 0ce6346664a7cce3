"""Which modules a configuration adapts, and regular expressions that must not stop the program."""

from __future__ import annotations

import threading
import time
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from boneconv.config import BoneConfig
from boneconv.errors import ConfigError
from boneconv.nn.model import regexes
from boneconv.nn.model.bone_model import BoneModel
from boneconv.nn.model.defaults import DEFAULT_TARGETS
from boneconv.nn.model.targets import find_targets
from boneconv.nn.model.walking import bone_layers
from tests.nn.model.modules import MLP, Deep, make
from tests.oracle import models


@pytest.fixture
def deep() -> nn.Module:
    return make(Deep)


def _found(model: nn.Module, **options: Any) -> list[str]:
    return list(find_targets(model, BoneConfig(**{"r": 4} | options)))


# Lists of names


def test_a_list_matches_whole_names_and_what_follows_a_dot(deep: nn.Module) -> None:
    assert _found(deep, target_modules=["up"]) == [f"layers.{i}.up" for i in range(3)]
    assert _found(deep, target_modules=["1.up", "mix"]) == ["layers.1.up", "mix"]
    assert _found(deep, target_modules=["layers.2.down"]) == ["layers.2.down"]


def test_a_part_of_a_name_is_no_match(deep: nn.Module) -> None:
    for entry in ("p", "ers.0.up", ".up", "UP", "layers.0"):
        with pytest.raises(ConfigError):
            _found(deep, target_modules=[entry])


def test_a_list_without_a_match_names_what_was_asked_for_and_what_there_is(
    deep: nn.Module,
) -> None:
    with pytest.raises(ConfigError, match="none of the modules that target_modules names") as got:
        _found(deep, target_modules=["q_proj", "v_proj"])
    assert got.value.found == "q_proj, v_proj"
    assert got.value.expected == "of: down, lm_head, mix, up"
    with pytest.raises(ConfigError, match=r"target_modules \[\] matches no module"):
        _found(deep, target_modules=[])


def test_an_entry_that_matches_nothing_beside_others_is_a_warning(deep: nn.Module) -> None:
    with pytest.warns(UserWarning, match="no module for these entries of target_modules: q_proj"):
        assert _found(deep, target_modules=["q_proj", "mix"]) == ["mix"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("embed", "a Embedding"),
        ("layers", "a ModuleList"),
        ("smooth", r"a Conv2d of kernel \[3, 3\], not 1x1"),
    ],
)
def test_what_is_not_linear_is_refused_by_name(deep: nn.Module, entry: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"'{entry}' cannot be adapted: {reason}"):
        _found(deep, target_modules=[entry, "mix"])


def test_convolutions_that_are_not_linear_at_every_place_are_refused() -> None:
    for options in ({"stride": 2}, {"padding": 1}, {"groups": 2}):
        model = nn.Sequential(nn.Conv2d(4, 4, 1, **options))
        with pytest.raises(ConfigError, match="with stride, padding or groups"):
            _found(model, target_modules=["0"])


def test_a_layer_that_is_never_called_is_refused() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ConfigError, match="MultiheadAttention, which reads its weight"):
        _found(model, target_modules=["out_proj"])
    assert _found(model, target_modules="all-linear") == ["linear1", "linear2"]


def test_quantised_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="whose weight is not floating point"):
        _found(model, target_modules=["0"])


# What is left out


def test_exclude_modules_as_a_list_and_as_an_expression(deep: nn.Module) -> None:
    names = ["layers.0.up", "layers.2.up"]
    assert _found(deep, target_modules=["up"], exclude_modules=["1.up"]) == names
    assert _found(deep, target_modules=["up"], exclude_modules=r"layers\.1\..*") == names
    with pytest.raises(ConfigError, match="all 3 modules that match are left out by exclude_mod"):
        _found(deep, target_modules=["up"], exclude_modules=["up"])


def test_excluding_nothing_is_a_warning(deep: nn.Module) -> None:
    with pytest.warns(UserWarning, match=r"exclude_modules \[q\] leaves out none"):
        _found(deep, target_modules=["up"], exclude_modules=["q"])


def test_what_is_trained_in_full_is_not_adapted(deep: nn.Module) -> None:
    found = _found(deep, target_modules=["up", "lm_head"], modules_to_save=["lm_head", "1"])
    assert found == ["layers.0.up", "layers.2.up"]
    with pytest.raises(ConfigError, match=r"left out by modules_to_save \[lm_head\]"):
        _found(deep, target_modules=["lm_head"], modules_to_save=["lm_head"])


# Layers


@pytest.mark.parametrize("pattern", [None, "layers", ["blocks", "layers"], [], "lay.rs", "[^.]+"])
def test_layers_by_index(deep: nn.Module, pattern: Any) -> None:
    options = {"target_modules": ["up"], "layers_pattern": pattern}
    assert _found(deep, **options, layers_to_transform=1) == ["layers.1.up"]
    assert _found(deep, **options, layers_to_transform=0) == ["layers.0.up"]
    assert _found(deep, **options, layers_to_transform=[0, 2, 9]) == ["layers.0.up", "layers.2.up"]
    assert len(_found(deep, **options, layers_to_transform=[])) == 3


def test_a_module_that_is_named_exactly_is_adapted_whatever_its_layer(deep: nn.Module) -> None:
    found = _found(deep, target_modules=["mix", "up"], layers_to_transform=2)
    assert found == ["layers.2.up", "mix"]


def test_layers_that_are_not_there(deep: nn.Module) -> None:
    with pytest.raises(ConfigError, match="matches no module in the layers 7 of 'h'"):
        _found(deep, target_modules=["up"], layers_to_transform=7, layers_pattern="h")


def test_the_innermost_list_counts() -> None:
    inner = nn.ModuleDict({"h": nn.ModuleList([MLP(), MLP()])})
    model = nn.ModuleDict({"stages": nn.ModuleList([inner, nn.ModuleDict({"x": MLP()})])})
    options: dict[str, Any] = {"target_modules": ["lin0"], "layers_to_transform": 1}
    assert _found(model, **options) == ["stages.0.h.1.lin0", "stages.1.x.lin0"]
    assert _found(model, **options, layers_pattern="h") == ["stages.0.h.1.lin0"]
    assert _found(model, **options, layers_pattern="stages") == ["stages.1.x.lin0"]


# all-linear


def test_all_linear_is_everything_but_the_output_layer(deep: nn.Module) -> None:
    expected = [f"layers.{i}.{n}" for i in range(3) for n in ("up", "down")] + ["mix"]
    assert _found(deep, target_modules="all-linear") == expected
    assert _found(deep, target_modules="ALL-LINEAR") == expected


def test_the_output_layer_of_a_transformers_model_is_what_it_says() -> None:
    model = models.gpt_neox()  # its head is called embed_out
    head = model.get_output_embeddings()
    found = find_targets(model, BoneConfig(r=4, target_modules="all-linear"))
    assert head is not None
    assert all(module is not head for module in found.values())
    assert len(found) == 8


def test_the_classifier_stays_out_where_the_task_is_to_classify() -> None:
    options = {"target_modules": "all-linear"}
    assert "classifier" not in _found(models.bert_classifier(), **options, task_type="SEQ_CLS")
    assert "classifier" in _found(models.bert_classifier(), **options)


def test_layers_that_are_adapted_already_are_found_as_what_they_are() -> None:
    model = BoneModel(make(Deep), BoneConfig(r=4, target_modules=["up"]))
    before = set(_found(make(Deep), target_modules="all-linear"))
    assert set(_found(model.model, target_modules="all-linear")) == before


# Without target_modules


@pytest.mark.parametrize(
    ("build", "expected"),
    [(models.llama_tied, {"q_proj", "v_proj"}), (models.bert_headless, {"query", "value"}),
     (models.vit, {"q_proj", "v_proj"}), (models.gpt_neox, {"query_key_value"})],
)  # fmt: skip
def test_the_architecture_decides_where_nothing_is_named(build: Any, expected: set[str]) -> None:
    assert {name.rpartition(".")[2] for name in _found(build())} == expected


def test_the_architecture_of_a_configuration_that_is_a_dict() -> None:
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "dense": nn.Linear(4, 4)})
    model.config = {"model_type": "bert"}  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _found(model) == ["query"]


def test_an_unknown_architecture_is_an_error_that_names_the_candidates(deep: nn.Module) -> None:
    with pytest.raises(ConfigError, match="this architecture has no default") as caught:
        _found(deep)
    assert caught.value.expected == "target_modules, of: down, lm_head, mix, up"
    deep.config = {"model_type": "deep"}  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="found model_type 'deep'"):
        _found(deep)


def test_the_table_says_what_peft_says() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_BONE_TARGET_MODULES_MAPPING as THEIRS

    without_linear = {"gpt2", "btlm"}
    assert set(THEIRS) - set(DEFAULT_TARGETS) == without_linear
    for kind in set(THEIRS) - without_linear:
        assert DEFAULT_TARGETS[kind] == tuple(THEIRS[kind]), kind


@pytest.mark.parametrize(
    "kind", ["cohere", "distilbert", "granite", "modernbert", "olmo2", "phi3", "smollm3", "whisper"]
)
def test_our_own_entries_name_linear_modules(kind: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(CONFIG_MAPPING[kind]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _found(model)


# A module at two places


def test_a_module_at_two_places_is_adapted_at_both() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": shared}), "b": nn.ModuleDict({"k": shared})})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bone = BoneModel(model, BoneConfig(r=2, target_modules=["q"]))
    assert model["a"]["q"] is model["b"]["k"]
    assert list(bone_layers(model)) == ["a.q"]
    bone.unload()
    assert model["a"]["q"] is shared
    assert model["b"]["k"] is shared


# Regular expressions


def test_an_expression_matches_whole_names(deep: nn.Module) -> None:
    assert _found(deep, target_modules=r".*\.up") == [f"layers.{i}.up" for i in range(3)]
    assert _found(deep, target_modules=r"layers\.(?!1)\d\.(up|down)") == [
        "layers.0.up", "layers.0.down", "layers.2.up", "layers.2.down"
    ]  # fmt: skip
    assert _found(deep, target_modules="mix") == ["mix"]
    with pytest.raises(ConfigError, match="target_modules 'up' matches no module"):
        _found(deep, target_modules="up")


@pytest.mark.parametrize("pattern", ["(", "*", "(?P<a>x)(?P<a>y)", "a{99999999999999999999}"])
def test_what_is_no_expression_says_so(deep: nn.Module, pattern: str) -> None:
    with pytest.raises(ConfigError, match="target_modules is no regular expression"):
        _found(deep, target_modules=pattern)


CATASTROPHES = ["(a+)+$", "(a|aa)+b", "(a*)*b", r"(?:a|a|a)*\d"]


def _long() -> nn.Module:
    return nn.ModuleDict({"a" * 60 + "!": nn.Linear(4, 4), "q": nn.Linear(4, 4)})


@pytest.mark.parametrize("pattern", CATASTROPHES)
def test_an_expression_that_would_take_forever_is_stopped(pattern: str) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match="target_modules is a regular expression that takes too"):
        _found(_long(), target_modules=pattern)
    assert time.monotonic() - start < 6 * regexes.SECONDS


def test_the_other_fields_with_expressions_are_stopped_too() -> None:
    with pytest.raises(ConfigError, match="exclude_modules is a regular expression that takes"):
        _found(_long(), target_modules="all-linear", exclude_modules=CATASTROPHES[0])
    model = nn.ModuleDict({"a" * 60 + "!": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})])})
    with pytest.raises(ConfigError, match="layers_pattern is a regular expression that takes"):
        _found(model, target_modules=["q"], layers_to_transform=0, layers_pattern="(a+)+$")


def test_it_is_stopped_in_another_thread_too() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            _found(_long(), target_modules=CATASTROPHES[0])
        except ConfigError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert len(caught) == 1


def test_a_machine_without_a_python_to_start_says_what_to_do(
    deep: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("/nowhere/python", "/bin/true"):
        monkeypatch.setattr("sys.executable", program)
        with pytest.raises(ConfigError, match=r"needs a Python process .*Give a list of names"):
            _found(deep, target_modules=r".*\.up")
    assert _found(deep, target_modules=["mix"], layers_to_transform=1) == ["mix"]
