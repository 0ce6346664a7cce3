"""Heads and embeddings: tied, trained, of another size, or lacking in the base."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import boneconv
from boneconv.errors import FormatError, NameMatchError, ShapeError
from boneconv.kernels import exact
from tests.builders import DTYPES, make_adapter, make_base, same_bits, unpack
from tests.conftest import TinyCase
from tests.merging.tiny_merges import (
    EMBEDDING,
    HEAD,
    WEIGHTS,
    actions_of,
    adapter_of,
    blocks_of,
    merge_case,
    rare_architectures,
    rewritten,
    stage_of,
    weights_of,
)
from tests.oracle import models, tiny

__all__ = ["rare_architectures"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def _config_edits(case: tiny.Case, out: Path) -> dict[str, object]:
    before = json.loads((case.base / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    assert list(before) == list(after)
    return {key: after[key] for key in after if after[key] != before[key]}


def test_a_saved_head_is_untied_from_the_embedding(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, out = tiny_case("llama-lm-head"), tmp_path / "out"
    result = merge_case(case, out)
    merged = weights_of(out)
    assert same_bits(merged[HEAD], adapter_of(case)[HEAD])
    assert same_bits(merged[EMBEDDING], weights_of(case.base)[EMBEDDING])
    assert actions_of(out)[HEAD] == "add"
    assert _config_edits(case, out) == {"tie_word_embeddings": False}
    assert any("tied" in note for note in result.notes)


def test_a_saved_embedding_leaves_the_head_on_the_old_one(
    tiny_case: TinyCase, tmp_path: Path
) -> None:
    case, out = tiny_case("llama-embedding"), tmp_path / "out"
    merge_case(case, out)
    merged = weights_of(out)
    assert same_bits(merged[EMBEDDING], adapter_of(case)[EMBEDDING])
    assert same_bits(merged[HEAD], weights_of(case.base)[EMBEDDING])
    assert (actions_of(out)[EMBEDDING], actions_of(out)[HEAD]) == ("replace", "add")
    assert _config_edits(case, out) == {"tie_word_embeddings": False}


def test_both_saved_and_equal_stay_tied(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, out = tiny_case("llama-embedding-and-lm-head"), tmp_path / "out"
    merge_case(case, out)
    assert same_bits(weights_of(out)[EMBEDDING], adapter_of(case)[EMBEDDING])
    assert HEAD not in weights_of(out)
    assert (out / "config.json").read_bytes() == (case.base / "config.json").read_bytes()


def test_both_saved_and_different_are_untied(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, out = tiny_case("llama-different-embeddings"), tmp_path / "out"
    merge_case(case, out)
    assert same_bits(weights_of(out)[EMBEDDING], adapter_of(case)[EMBEDDING])
    assert same_bits(weights_of(out)[HEAD], adapter_of(case)[HEAD])
    assert _config_edits(case, out) == {"tie_word_embeddings": False}


def test_a_saved_head_of_an_untied_model_only_replaces(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, out = tiny_case("gpt-neox-lm-head"), tmp_path / "out"
    merge_case(case, out)
    assert same_bits(weights_of(out)["embed_out.weight"], adapter_of(case)[HEAD])
    assert actions_of(out)["embed_out.weight"] == "replace"
    assert weights_of(out).keys() == weights_of(case.base).keys()
    assert _config_edits(case, out) == {}


@pytest.mark.parametrize("name", ["llama-resized", "llama-untied-resized"])
def test_a_resized_vocabulary(tiny_case: TinyCase, tmp_path: Path, name: str) -> None:
    case, out = tiny_case(name), tmp_path / "out"
    merge_case(case, out)
    assert _config_edits(case, out) == {"vocab_size": models.MORE_VOCAB}
    assert same_bits(weights_of(out)[EMBEDDING], adapter_of(case)[EMBEDDING])
    assert (HEAD in weights_of(out)) == (name == "llama-untied-resized")


def test_a_resized_vocabulary_in_a_nested_configuration(
    tiny_case: TinyCase, tmp_path: Path
) -> None:
    case, out = tiny_case("llava-resized"), tmp_path / "out"
    merge_case(case, out)
    before = json.loads((case.base / "config.json").read_text())["text_config"]
    assert _config_edits(case, out) == {"text_config": before | {"vocab_size": models.MORE_VOCAB}}


def test_what_peft_writes_three_times_is_merged_once(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, out = tiny_case("llama-resized-both"), tmp_path / "out"
    written = adapter_of(case)
    copies = {f"lm_head.{kind}.weight" for kind in ("modules_to_save", "original_module")}
    assert copies < written.keys()
    merge_case(case, out)
    assert same_bits(weights_of(out)[HEAD], written[HEAD])
    assert same_bits(weights_of(out)[EMBEDDING], written[EMBEDDING])


def test_two_trained_copies_that_differ(tiny_case: TinyCase, tmp_path: Path) -> None:
    case = tiny_case("llama-resized-both")
    tensors = unpack(case.adapter / WEIGHTS)
    key = f"{tiny.PREFIX}lm_head.modules_to_save.weight"
    changed = rewritten(case, tmp_path / "adapter", tensors | {key: -tensors[key]})
    with pytest.raises(boneconv.BoneconvError, match=r"two tensors for 'lm_head\.weight'"):
        merge_case(changed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama-tied-head-block", "llama-untied-head-block"])
def test_a_block_on_a_head_that_came_with_it(
    tiny_case: TinyCase, tmp_path: Path, name: str
) -> None:
    """PEFT puts the saved weight below the block in place of the base's."""
    case, key = tiny_case(name), f"{tiny.PREFIX}lm_head.base_layer.weight"
    tensors = unpack(case.adapter / WEIGHTS)
    assert key in tensors
    changed = rewritten(case, tmp_path / "adapter", tensors | {key: 0.5 * tensors[key]})
    merge_case(changed, tmp_path / "out")
    block = tensors[f"{tiny.PREFIX}lm_head.bone_block"]
    expected = exact.merge(0.5 * tensors[key], [stage_of(case, block)], DTYPES["F32"])
    assert same_bits(weights_of(tmp_path / "out")[HEAD], expected)


def test_two_adapters_that_bring_the_same_head(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, key = tiny_case("llama-untied-head-block"), f"{tiny.PREFIX}lm_head.base_layer.weight"
    tensors = unpack(case.adapter / WEIGHTS)
    tensors[key] = 0.5 * tensors[key]
    first = rewritten(case, tmp_path / "first", tensors)
    second = rewritten(case, tmp_path / "second", tensors)
    other = rewritten(case, tmp_path / "other", tensors | {key: 0.5 * tensors[key]})
    merge_case(first, tmp_path / "out", more=[second.adapter])
    stage = stage_of(case, tensors[f"{tiny.PREFIX}lm_head.bone_block"])
    expected = exact.merge(tensors[key], [stage, stage], DTYPES["F32"])
    assert same_bits(weights_of(tmp_path / "out")[HEAD], expected)
    with pytest.raises(NameMatchError, match=r"trained on different 'lm_head\.weight'"):
        merge_case(first, tmp_path / "none", more=[other.adapter])


def test_a_head_of_another_size_than_its_embedding(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, key = tiny_case("llama-lm-head"), tiny.PREFIX + HEAD
    tensors = unpack(case.adapter / WEIGHTS)
    taller = np.concatenate([tensors[key], tensors[key][:8]])
    changed = rewritten(case, tmp_path / "adapter", tensors | {key: taller})
    with pytest.raises(ShapeError, match=r"'lm_head\.weight' does not fit"):
        merge_case(changed, tmp_path / "out")


def test_a_head_block_at_half_its_strength(tiny_case: TinyCase, tmp_path: Path) -> None:
    case = tiny_case("llama-untied-head-block")
    merge_case(case, tmp_path / "out", scale=0.5)
    stage = dataclasses.replace(stage_of(case, blocks_of(case)[HEAD]), scale=0.5)
    expected = exact.merge(weights_of(case.base)[HEAD], [stage], DTYPES["F32"])
    assert same_bits(weights_of(tmp_path / "out")[HEAD], expected)


def test_a_saved_tensor_in_place_of_integers(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    saved = {"model.position_ids": np.zeros(6, np.float32)}
    adapter = make_adapter(tmp_path / "adapter", saved=saved)
    with pytest.raises(FormatError, match=r"replaces 'model\.position_ids', whose dtype is I64"):
        boneconv.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- heads that the base lacks -----------------------------------------------------------------


def test_a_classifier_is_added_to_a_base_without_a_head(
    tiny_case: TinyCase, tmp_path: Path
) -> None:
    case, out = tiny_case("bert-headless"), tmp_path / "out"
    merge_case(case, out)
    added = [tensor for tensor, action in actions_of(out).items() if action == "add"]
    assert sorted(added) == ["classifier.bias", "classifier.weight"]
    for tensor in added:
        assert same_bits(weights_of(out)[tensor], adapter_of(case)[tensor])
    assert list(weights_of(out))[: len(weights_of(case.base))] == list(weights_of(case.base))


def test_an_added_classifier_has_the_base_s_dtype(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, out = tiny_case("bert-headless", base_dtype="bfloat16"), tmp_path / "out"
    merge_case(case, out)
    assert {weight.dtype for weight in weights_of(out).values()} == {DTYPES["BF16"]}
