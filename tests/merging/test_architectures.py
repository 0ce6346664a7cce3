"""Every architecture that boneconv promises to merge, against PEFT and the exact values."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import boneconv
from boneconv.errors import NameMatchError
from boneconv.kernels import exact
from tests.builders import DTYPES, same_bits, unpack
from tests.conftest import TinyCase
from tests.merging.rare import RARE
from tests.merging.tiny_merges import (
    EMBEDDING,
    HEAD,
    WEIGHTS,
    actions_of,
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

TOLERANCE = 2e-5


def _merge_wide(case: tiny.Case, out: Path) -> boneconv.MergeResult:
    return merge_case(case, out, dtype="keep" if case.base_dtype == "float32" else "float32")


def _assert_pefts_logits(case: tiny.Case, out: Path) -> None:
    found = tiny.logits(case.load(out), case.inputs())
    expected = tiny.peft_logits(case)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE


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
    assert {w.dtype for w in weights_of(tmp_path / "out").values()} == {DTYPES["F32"]}
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
    merge_case(case, tmp_path / "out")
    base, merged, homes = weights_of(case.base), weights_of(tmp_path / "out"), tiny.disk_names(case)
    blocks = blocks_of(case)
    assert blocks
    for parameter, block in blocks.items():
        weight = base[homes[parameter]]
        expected = exact.merge(weight, [stage_of(case, block)], weight.dtype)
        assert same_bits(merged[homes[parameter]], expected), parameter


@pytest.mark.parametrize("name", tiny.NAMES)
def test_what_the_adapter_does_not_touch_is_byte_identical(
    tiny_case: TinyCase, tmp_path: Path, name: str
) -> None:
    case = tiny_case(name)
    out = tmp_path / "out"
    merge_case(case, out)
    base, merged, homes = weights_of(case.base), weights_of(out), tiny.disk_names(case)
    actions = actions_of(out)
    touched = {home for name, home in homes.items() if (name, home) != (HEAD, EMBEDDING)}
    for tensor in base:
        if tensor in touched:
            assert actions[tensor] in ("merge", "replace")
            assert not same_bits(base[tensor], merged[tensor])
        else:
            assert actions[tensor] == "copy"
            assert same_bits(base[tensor], merged[tensor])
    assert {homes[parameter] for parameter in blocks_of(case)} == {
        tensor for tensor, action in actions.items() if action == "merge"
    }
    assert list(merged)[: len(base)] == list(base)
    assert actions.keys() == merged.keys()


@pytest.mark.parametrize("name", [name for name in tiny.NAMES if "llama-" not in name])
def test_the_configuration_is_the_base_s(tiny_case: TinyCase, tmp_path: Path, name: str) -> None:
    case = tiny_case(name)
    merge_case(case, tmp_path / "out")
    files = {path.name for path in case.base.iterdir()} | {"README.md", "boneconv.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    for file in ("config.json", "generation_config.json"):
        if (case.base / file).is_file():
            assert (tmp_path / "out" / file).read_bytes() == (case.base / file).read_bytes()


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
    merge_case(case, tmp_path / "one")
    merge_case(disk, tmp_path / "other")
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
    changed = rewritten(case, tmp_path / "adapter", tensors | {key: block})
    with pytest.raises(NameMatchError) as caught:
        merge_case(changed, tmp_path / "out")
    assert caught.value.exit_code == 2
    assert f"{stray}.weight" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_saved_tensor_without_a_home_is_named(tiny_case: TinyCase, tmp_path: Path) -> None:
    case = tiny_case("bert-headless")
    tensors = unpack(case.adapter / WEIGHTS)
    key = f"{tiny.PREFIX}bert.encoder.layer.9.output.dense.bias"
    changed = rewritten(
        case, tmp_path / "adapter", tensors | {key: np.zeros(models.HIDDEN, np.float32)}
    )
    with pytest.raises(NameMatchError, match=r"layer\.9\.output\.dense\.bias"):
        merge_case(changed, tmp_path / "out")


def test_a_module_that_is_stored_in_parts_is_refused(tiny_case: TinyCase, tmp_path: Path) -> None:
    case = tiny_case("mixtral")
    tensors = unpack(case.adapter / WEIGHTS)
    key = f"{tiny.PREFIX}model.layers.0.mlp.experts.down_proj"
    saved = np.zeros((4, models.HIDDEN, models.WIDE), np.float32)
    changed = rewritten(case, tmp_path / "adapter", tensors | {key: saved})
    with pytest.raises(NameMatchError, match="stored in another layout") as caught:
        merge_case(changed, tmp_path / "out")
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
    merge_case(case, tmp_path / "with")
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
