"""Every architecture that boneconv promises to merge, against PEFT and the exact values."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

import boneconv
from boneconv.config import Variant
from boneconv.errors import FormatError, NameMatchError, ShapeError
from boneconv.kernels import Stage, exact
from tests.builders import DTYPES, Array, make_adapter, make_base, pack, same_bits, unpack
from tests.conftest import TinyCase
from tests.merging.rare import RARE
from tests.oracle import models, tiny
from tests.oracle.architectures import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

TOLERANCE = 2e-5
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def rare_architectures() -> Iterator[None]:
    """The oracle looks architectures up in its table; here it finds the rare ones too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, architecture in RARE.items():
            patch.setitem(ARCHITECTURES, name, architecture)  # type: ignore[arg-type]
        yield


# --- helpers -----------------------------------------------------------------------------------


def _merge(case: tiny.Case, out: Path, **options: object) -> boneconv.MergeResult:
    return boneconv.merge(case.base, case.adapter, out, **options)


def _merge_wide(case: tiny.Case, out: Path) -> boneconv.MergeResult:
    return _merge(case, out, dtype="keep" if case.base_dtype == "float32" else "float32")


def _assert_pefts_logits(case: tiny.Case, out: Path) -> None:
    found = tiny.logits(case.load(out), case.inputs())
    expected = tiny.peft_logits(case)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE


def _actions(out: Path) -> dict[str, str]:
    record = json.loads((out / "boneconv.json").read_text())
    return {name: entry["action"] for name, entry in record["tensors"].items()}


def _weights(folder: Path) -> dict[str, Array]:
    return unpack(folder / "model.safetensors")


def _adapter(case: tiny.Case) -> dict[str, Array]:
    tensors = unpack(case.adapter / WEIGHTS)
    return {name.removeprefix(tiny.PREFIX): tensor for name, tensor in tensors.items()}


def _blocks(case: tiny.Case) -> dict[str, Array]:
    """The adapter's blocks by the parameter that they update."""
    return {
        name.removesuffix(suffix) + ".weight": block
        for name, block in _adapter(case).items()
        for suffix in tiny.BLOCKS
        if name.endswith(suffix)
    }


def _stage(case: tiny.Case, block: Array) -> Stage:
    variants = {"bone": "bone", "miss": "bone", "bat": "bat", "miss-bat": "bat", "mini": "mini"}
    return Stage(Variant(variants[case.variant]), block)


def _rewrite(case: tiny.Case, folder: Path, tensors: Mapping[str, Array]) -> tiny.Case:
    """The case with other tensors in its adapter."""
    shutil.copytree(case.adapter, folder)
    (folder / WEIGHTS).write_bytes(pack(tensors, {"format": "pt"}))
    return dataclasses.replace(case, adapter=folder)


# --- PEFT's logits -----------------------------------------------------------------------------

COMMON: tuple[tuple[tiny.Variant, int], ...] = (("bone", tiny.RANK), ("bat", tiny.RANK))
OTHERS: tuple[tuple[tiny.Variant, int], ...] = (
    ("miss", tiny.RANK),
    ("miss-bat", tiny.RANK),
    ("mini", tiny.RANK),
    ("bone", tiny.RAGGED_RANK),
    ("miss", tiny.RAGGED_RANK),
    ("mini", tiny.RAGGED_RANK),
)
VARIED = ("llama-tied", "bert", "vit")


@pytest.mark.parametrize(("variant", "rank"), COMMON)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_merged_folder_loads_and_gives_pefts_logits(
    tiny_case: TinyCase, tmp_path: Path, name: str, variant: tiny.Variant, rank: int
) -> None:
    case = tiny_case(name, variant=variant, rank=rank)
    _merge_wide(case, tmp_path / "out")
    _assert_pefts_logits(case, tmp_path / "out")


@pytest.mark.parametrize(("variant", "rank"), OTHERS)
@pytest.mark.parametrize(
    "name",
    [name if name in VARIED else pytest.param(name, marks=pytest.mark.slow) for name in tiny.NAMES],
)
def test_miss_mini_and_ragged_ranks(
    tiny_case: TinyCase, tmp_path: Path, name: str, variant: tiny.Variant, rank: int
) -> None:
    case = tiny_case(name, variant=variant, rank=rank)
    _merge_wide(case, tmp_path / "out")
    _assert_pefts_logits(case, tmp_path / "out")


@pytest.mark.parametrize("variant", ["bone", pytest.param("bat", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RARE)
def test_rare_adapters(
    tiny_case: TinyCase, tmp_path: Path, name: str, variant: tiny.Variant
) -> None:
    case = tiny_case(name, variant=variant)
    _merge_wide(case, tmp_path / "out")
    _assert_pefts_logits(case, tmp_path / "out")


@pytest.mark.parametrize("adapter_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("base_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_half_precision_merged_in_float32_gives_pefts_logits(
    tiny_case: TinyCase,
    tmp_path: Path,
    variant: tiny.Variant,
    base_dtype: str,
    adapter_dtype: str,
) -> None:
    case = tiny_case("qwen2", variant=variant, base_dtype=base_dtype, adapter_dtype=adapter_dtype)
    _merge_wide(case, tmp_path / "out")
    _assert_pefts_logits(case, tmp_path / "out")
    assert {w.dtype for w in _weights(tmp_path / "out").values()} == {DTYPES["F32"]}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    options = json.loads((tmp_path / "out" / "boneconv.json").read_text())["options"]
    assert options["dtype"] == "float32"


# --- the exact values, and all other tensors as they were --------------------------------------

EXACT: list[tuple[str, tiny.Variant, int, str, str]] = [
    ("qwen2", "bone", tiny.RANK, "float16", "float32"),
    ("qwen2", "bat", tiny.RANK, "float16", "float16"),
    ("llama-untied", "bat", tiny.RANK, "bfloat16", "float32"),
    ("gpt-neox", "bone", tiny.RAGGED_RANK, "bfloat16", "bfloat16"),
    ("opt-headless", "miss-bat", tiny.RANK, "float16", "float32"),
    ("vit", "mini", tiny.RAGGED_RANK, "bfloat16", "float32"),
    ("llava", "bone", tiny.RANK, "float32", "bfloat16"),
    ("bert", "bat", tiny.RANK, "float32", "float32"),
]


@pytest.mark.parametrize(("name", "variant", "rank", "base_dtype", "adapter_dtype"), EXACT)
def test_every_merged_weight_is_the_exact_value_rounded_once(
    tiny_case: TinyCase,
    tmp_path: Path,
    name: str,
    variant: tiny.Variant,
    rank: int,
    base_dtype: str,
    adapter_dtype: str,
) -> None:
    case = tiny_case(
        name, variant=variant, rank=rank, base_dtype=base_dtype, adapter_dtype=adapter_dtype
    )
    _merge(case, tmp_path / "out")
    base, merged, homes = _weights(case.base), _weights(tmp_path / "out"), tiny.disk_names(case)
    blocks = _blocks(case)
    assert blocks
    for parameter, block in blocks.items():
        weight = base[homes[parameter]]
        expected = exact.merge(weight, [_stage(case, block)], weight.dtype)
        assert same_bits(merged[homes[parameter]], expected), parameter


@pytest.mark.parametrize("name", tiny.NAMES)
def test_what_the_adapter_does_not_touch_is_byte_identical(
    tiny_case: TinyCase, tmp_path: Path, name: str
) -> None:
    case = tiny_case(name)
    out = tmp_path / "out"
    _merge(case, out)
    base, merged, homes = _weights(case.base), _weights(out), tiny.disk_names(case)
    actions = _actions(out)
    touched = {home for name, home in homes.items() if (name, home) != (HEAD, EMBEDDING)}
    for tensor in base:
        if tensor in touched:
            assert actions[tensor] in ("merge", "replace")
            assert not same_bits(base[tensor], merged[tensor])
        else:
            assert actions[tensor] == "copy"
            assert same_bits(base[tensor], merged[tensor])
    assert {homes[parameter] for parameter in _blocks(case)} == {
        tensor for tensor, action in actions.items() if action == "merge"
    }
    assert list(merged)[: len(base)] == list(base)
    assert actions.keys() == merged.keys()


@pytest.mark.parametrize("name", [name for name in tiny.NAMES if "llama-" not in name])
def test_the_configuration_is_the_base_s(tiny_case: TinyCase, tmp_path: Path, name: str) -> None:
    case = tiny_case(name)
    _merge(case, tmp_path / "out")
    files = {path.name for path in case.base.iterdir()} | {"README.md", "boneconv.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    for file in ("config.json", "generation_config.json"):
        if (case.base / file).is_file():
            assert (tmp_path / "out" / file).read_bytes() == (case.base / file).read_bytes()


# --- tied heads, embeddings, resized vocabularies ----------------------------------------------

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _config_edits(case: tiny.Case, out: Path) -> dict[str, object]:
    before = json.loads((case.base / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    assert list(before) == list(after)
    return {key: after[key] for key in after if after[key] != before[key]}


def test_a_saved_head_is_untied_from_the_embedding(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, out = tiny_case("llama-lm-head"), tmp_path / "out"
    result = _merge(case, out)
    merged = _weights(out)
    assert same_bits(merged[HEAD], _adapter(case)[HEAD])
    assert same_bits(merged[EMBEDDING], _weights(case.base)[EMBEDDING])
    assert _actions(out)[HEAD] == "add"
    assert _config_edits(case, out) == {"tie_word_embeddings": False}
    assert any("tied" in note for note in result.notes)


def test_a_saved_embedding_leaves_the_head_on_the_old_one(
    tiny_case: TinyCase, tmp_path: Path
) -> None:
    case, out = tiny_case("llama-embedding"), tmp_path / "out"
    _merge(case, out)
    merged = _weights(out)
    assert same_bits(merged[EMBEDDING], _adapter(case)[EMBEDDING])
    assert same_bits(merged[HEAD], _weights(case.base)[EMBEDDING])
    assert (_actions(out)[EMBEDDING], _actions(out)[HEAD]) == ("replace", "add")
    assert _config_edits(case, out) == {"tie_word_embeddings": False}


def test_both_saved_and_equal_stay_tied(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, out = tiny_case("llama-embedding-and-lm-head"), tmp_path / "out"
    _merge(case, out)
    assert same_bits(_weights(out)[EMBEDDING], _adapter(case)[EMBEDDING])
    assert HEAD not in _weights(out)
    assert (out / "config.json").read_bytes() == (case.base / "config.json").read_bytes()


def test_both_saved_and_different_are_untied(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, out = tiny_case("llama-different-embeddings"), tmp_path / "out"
    _merge(case, out)
    assert same_bits(_weights(out)[EMBEDDING], _adapter(case)[EMBEDDING])
    assert same_bits(_weights(out)[HEAD], _adapter(case)[HEAD])
    assert _config_edits(case, out) == {"tie_word_embeddings": False}


def test_a_saved_head_of_an_untied_model_only_replaces(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, out = tiny_case("gpt-neox-lm-head"), tmp_path / "out"
    _merge(case, out)
    assert same_bits(_weights(out)["embed_out.weight"], _adapter(case)[HEAD])
    assert _actions(out)["embed_out.weight"] == "replace"
    assert _weights(out).keys() == _weights(case.base).keys()
    assert _config_edits(case, out) == {}


@pytest.mark.parametrize("name", ["llama-resized", "llama-untied-resized"])
def test_a_resized_vocabulary(tiny_case: TinyCase, tmp_path: Path, name: str) -> None:
    case, out = tiny_case(name), tmp_path / "out"
    _merge(case, out)
    assert _config_edits(case, out) == {"vocab_size": models.MORE_VOCAB}
    assert same_bits(_weights(out)[EMBEDDING], _adapter(case)[EMBEDDING])
    assert (HEAD in _weights(out)) == (name == "llama-untied-resized")


def test_a_resized_vocabulary_in_a_nested_configuration(
    tiny_case: TinyCase, tmp_path: Path
) -> None:
    case, out = tiny_case("llava-resized"), tmp_path / "out"
    _merge(case, out)
    before = json.loads((case.base / "config.json").read_text())["text_config"]
    assert _config_edits(case, out) == {"text_config": before | {"vocab_size": models.MORE_VOCAB}}


def test_what_peft_writes_three_times_is_merged_once(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, out = tiny_case("llama-resized-both"), tmp_path / "out"
    written = _adapter(case)
    copies = {f"lm_head.{kind}.weight" for kind in ("modules_to_save", "original_module")}
    assert copies < written.keys()
    _merge(case, out)
    assert same_bits(_weights(out)[HEAD], written[HEAD])
    assert same_bits(_weights(out)[EMBEDDING], written[EMBEDDING])


def test_two_trained_copies_that_differ(tiny_case: TinyCase, tmp_path: Path) -> None:
    case = tiny_case("llama-resized-both")
    tensors = unpack(case.adapter / WEIGHTS)
    key = f"{tiny.PREFIX}lm_head.modules_to_save.weight"
    changed = _rewrite(case, tmp_path / "adapter", tensors | {key: -tensors[key]})
    with pytest.raises(boneconv.BoneconvError, match=r"two tensors for 'lm_head\.weight'"):
        _merge(changed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama-tied-head-block", "llama-untied-head-block"])
def test_a_block_on_a_head_that_came_with_it(
    tiny_case: TinyCase, tmp_path: Path, name: str
) -> None:
    """PEFT puts the saved weight below the block in place of the base's."""
    case, key = tiny_case(name), f"{tiny.PREFIX}lm_head.base_layer.weight"
    tensors = unpack(case.adapter / WEIGHTS)
    assert key in tensors
    changed = _rewrite(case, tmp_path / "adapter", tensors | {key: 0.5 * tensors[key]})
    _merge(changed, tmp_path / "out")
    block = tensors[f"{tiny.PREFIX}lm_head.bone_block"]
    expected = exact.merge(0.5 * tensors[key], [_stage(case, block)], DTYPES["F32"])
    assert same_bits(_weights(tmp_path / "out")[HEAD], expected)


def test_two_adapters_that_bring_the_same_head(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, key = tiny_case("llama-untied-head-block"), f"{tiny.PREFIX}lm_head.base_layer.weight"
    tensors = unpack(case.adapter / WEIGHTS)
    tensors[key] = 0.5 * tensors[key]
    first = _rewrite(case, tmp_path / "first", tensors)
    second = _rewrite(case, tmp_path / "second", tensors)
    other = _rewrite(case, tmp_path / "other", tensors | {key: 0.5 * tensors[key]})
    _merge(first, tmp_path / "out", more=[second.adapter])
    stage = _stage(case, tensors[f"{tiny.PREFIX}lm_head.bone_block"])
    expected = exact.merge(tensors[key], [stage, stage], DTYPES["F32"])
    assert same_bits(_weights(tmp_path / "out")[HEAD], expected)
    with pytest.raises(NameMatchError, match=r"trained on different 'lm_head\.weight'"):
        _merge(first, tmp_path / "none", more=[other.adapter])


def test_a_head_of_another_size_than_its_embedding(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, key = tiny_case("llama-lm-head"), tiny.PREFIX + HEAD
    tensors = unpack(case.adapter / WEIGHTS)
    taller = np.concatenate([tensors[key], tensors[key][:8]])
    changed = _rewrite(case, tmp_path / "adapter", tensors | {key: taller})
    with pytest.raises(ShapeError, match=r"'lm_head\.weight' does not fit"):
        _merge(changed, tmp_path / "out")


def test_a_head_block_at_half_its_strength(tiny_case: TinyCase, tmp_path: Path) -> None:
    case = tiny_case("llama-untied-head-block")
    _merge(case, tmp_path / "out", scale=0.5)
    stage = dataclasses.replace(_stage(case, _blocks(case)[HEAD]), scale=0.5)
    expected = exact.merge(_weights(case.base)[HEAD], [stage], DTYPES["F32"])
    assert same_bits(_weights(tmp_path / "out")[HEAD], expected)


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
    _merge(case, out)
    added = [tensor for tensor, action in _actions(out).items() if action == "add"]
    assert sorted(added) == ["classifier.bias", "classifier.weight"]
    for tensor in added:
        assert same_bits(_weights(out)[tensor], _adapter(case)[tensor])
    assert list(_weights(out))[: len(_weights(case.base))] == list(_weights(case.base))


def test_an_added_classifier_has_the_base_s_dtype(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, out = tiny_case("bert-headless", base_dtype="bfloat16"), tmp_path / "out"
    _merge(case, out)
    assert {weight.dtype for weight in _weights(out).values()} == {DTYPES["BF16"]}


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["vit", "llava", "llava-resaved", "qwen2-vl", "opt-headless", "bert-headless", "llama-tied"],
)
def test_an_adapter_with_the_names_on_disk_gives_the_same_weights(
    tiny_case: TinyCase, tmp_path: Path, name: str
) -> None:
    case = tiny_case(name)
    disk = dataclasses.replace(case, adapter=tiny.write_with_disk_names(case, tmp_path / "adapter"))
    _merge(case, tmp_path / "one")
    _merge(disk, tmp_path / "other")
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "other")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["llama-tied", "llava", "bert-headless"])
@pytest.mark.parametrize("stray", ["model.layers.7.self_attn.q_proj", "q_proj", "elsewhere"])
def test_an_adapter_key_without_a_home_is_named(
    tiny_case: TinyCase, tmp_path: Path, name: str, stray: str
) -> None:
    case = tiny_case(name)
    tensors = unpack(case.adapter / WEIGHTS)
    block = next(tensor for key, tensor in tensors.items() if key.endswith(".bone_block"))
    key = f"{tiny.PREFIX}{stray}.bone_block"
    changed = _rewrite(case, tmp_path / "adapter", tensors | {key: block})
    with pytest.raises(NameMatchError) as caught:
        _merge(changed, tmp_path / "out")
    assert caught.value.exit_code == 2
    assert f"{stray}.weight" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_saved_tensor_without_a_home_is_named(tiny_case: TinyCase, tmp_path: Path) -> None:
    case = tiny_case("bert-headless")
    tensors = unpack(case.adapter / WEIGHTS)
    key = f"{tiny.PREFIX}bert.encoder.layer.9.output.dense.bias"
    changed = _rewrite(
        case, tmp_path / "adapter", tensors | {key: np.zeros(models.HIDDEN, np.float32)}
    )
    with pytest.raises(NameMatchError, match=r"layer\.9\.output\.dense\.bias"):
        _merge(changed, tmp_path / "out")


def test_a_module_that_is_stored_in_parts_is_refused(tiny_case: TinyCase, tmp_path: Path) -> None:
    case = tiny_case("mixtral")
    tensors = unpack(case.adapter / WEIGHTS)
    key = f"{tiny.PREFIX}model.layers.0.mlp.experts.down_proj"
    saved = np.zeros((4, models.HIDDEN, models.WIDE), np.float32)
    changed = _rewrite(case, tmp_path / "adapter", tensors | {key: saved})
    with pytest.raises(NameMatchError, match="stored in another layout") as caught:
        _merge(changed, tmp_path / "out")
    assert "model.layers.0.mlp.experts.down_proj" in str(caught.value)


# --- without transformers ----------------------------------------------------------------------

WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from boneconv.cli import main
main()
"""


def _without_transformers(case: tiny.Case, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, "merge", case.base, case.adapter, out],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_names_that_match_directly_need_no_transformers(
    tiny_case: TinyCase, tmp_path: Path, variant: tiny.Variant
) -> None:
    case = tiny_case("llama-tied", variant=variant)
    done = _without_transformers(case, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    _merge(case, tmp_path / "with")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "with/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["llava", "vit", "llama-lm-head"])
def test_names_that_differ_need_the_extra(tiny_case: TinyCase, tmp_path: Path, name: str) -> None:
    done = _without_transformers(tiny_case(name), tmp_path / "out")
    assert done.returncode == 2
    assert "boneconv[transformers]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())
