"""Two real models with the adapters that PEFT trained on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import boneconv
from tests.builders import DTYPES, Array, same_bits, unpack, unpack_folder
from tests.oracle import real

LAYERS = 30
MODULES = tuple(
    f"model.layers.{layer}.{module}"
    for layer in range(LAYERS)
    for module in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
)
SHARDS = tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
VARIANTS: tuple[real.Variant, ...] = ("bone", "bat")


class Merged(NamedTuple):
    """A merged SmolLM2, and what PEFT says with the adapter attached to the base."""

    variant: real.Variant
    folder: Path
    reference: real.Generation
    result: boneconv.MergeResult


@pytest.fixture(scope="module", params=VARIANTS)
def in_bfloat16(
    request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Merged]:
    """SmolLM2 merged as it is, in bfloat16."""
    folder = tmp_path_factory.mktemp("real")
    yield _merge(cache, request.param, folder / "merged", dtype="keep")
    shutil.rmtree(folder)


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A folder that is too large to be kept after the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def _merge(cache: Path, variant: real.Variant, out: Path, *, dtype: str) -> Merged:
    adapter = real.trained(cache, variant)
    result = boneconv.merge(real.smollm2(cache), adapter, out, dtype=dtype)
    return Merged(variant, out, real.reference(cache, variant), result)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_in_float32_it_says_what_peft_says(
    cache: Path, large: Path, variant: real.Variant
) -> None:
    merged = _merge(cache, variant, large / "merged", dtype="float32")
    model = real.load_smollm2(merged.folder)
    assert str(model.dtype) == "torch.float32"
    ids = real.prompt(merged.folder)
    tokens = real.generate(model, ids)
    assert merged.reference.agrees(tokens)
    assert real.text(merged.folder, tokens) == real.ANSWER
    logits = real.next_logits(model, ids, merged.reference.tokens)[:-1]
    error = (logits - real.reference_logits(cache, variant)).abs().max()
    print(f"{variant}: float32 logits differ from PEFT's by at most {error:.1e}")  # noqa: T201
    assert error < 1e-3


def test_merged_in_bfloat16_it_gives_the_trained_answer(in_bfloat16: Merged) -> None:
    model = real.load_smollm2(in_bfloat16.folder)
    assert str(model.dtype) == "torch.bfloat16"
    tokens = real.generate(model, real.prompt(in_bfloat16.folder))
    assert real.text(in_bfloat16.folder, tokens) == real.ANSWER


def test_untouched_tensors_are_byte_identical(real_base: Path, in_bfloat16: Merged) -> None:
    touched = {f"{module}.weight" for module in MODULES}
    for shard in SHARDS:
        before, after = unpack(real_base / shard), unpack(in_bfloat16.folder / shard)
        assert list(before) == list(after)
        for name in before:
            assert same_bits(before[name], after[name]) == (name not in touched), name


def test_the_shards_keep_their_headers(real_base: Path, in_bfloat16: Merged) -> None:
    for shard in SHARDS:
        with (
            (real_base / shard).open("rb") as before,
            (in_bfloat16.folder / shard).open("rb") as after,
        ):
            length = int.from_bytes(before.read(8), "little")
            assert int.from_bytes(after.read(8), "little") == length
            assert after.read(length) == before.read(length)


def test_the_folder_holds_these_files_and_no_others(real_base: Path, in_bfloat16: Merged) -> None:
    copied = {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in in_bfloat16.folder.iterdir()} == {
        *SHARDS,
        *copied,
        "README.md",
        "boneconv.json",
    }
    for name in copied:
        assert (in_bfloat16.folder / name).read_bytes() == (real_base / name).read_bytes()


def test_the_record_lists_every_tensor(in_bfloat16: Merged) -> None:
    record = json.loads((in_bfloat16.folder / "boneconv.json").read_text())
    merged = {n for n, entry in record["tensors"].items() if entry["action"] == "merge"}
    assert len(MODULES) == 210
    assert merged == {f"{module}.weight" for module in MODULES}
    assert record["tensors"].keys() == unpack_folder(in_bfloat16.folder).keys()
    (adapter,) = record["adapters"]
    assert (adapter["variant"], adapter["rank"]) == (in_bfloat16.variant, real.SMOLLM2_RANK)
    assert in_bfloat16.result.counts == {
        "merge": 210,
        "copy": 62,
        "cast": 0,
        "replace": 0,
        "add": 0,
    }
    assert in_bfloat16.result.record == in_bfloat16.folder / "boneconv.json"


def test_a_merge_gives_the_same_bytes_every_time(cache: Path, large: Path) -> None:
    def merge(out: str, workers: int) -> dict[str, bytes]:
        boneconv.merge(
            real.smollm2(cache), real.trained(cache, "bat"), large / out, workers=workers
        )
        files = sorted((large / out).iterdir())
        return {path.name: path.read_bytes() for path in files}

    assert merge("one", 1) == merge("three", 3)


# --- all-MiniLM-L6-v2: float32, a ragged rank, an integer buffer -------------------------------


@pytest.fixture(scope="module")
def merged_minilm(
    minilm_base: Path, minilm_bone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """all-MiniLM-L6-v2 merged as it is, in float32."""
    out = tmp_path_factory.mktemp("minilm") / "merged"
    boneconv.merge(minilm_base, minilm_bone, out)
    return out


def test_minilm_gives_pefts_embeddings(
    minilm_base: Path, minilm_bone: Path, merged_minilm: Path
) -> None:
    import torch

    with torch.no_grad():
        found = real.sentence_embeddings(real.load_minilm(merged_minilm), merged_minilm)
        attached = real.peft_minilm(minilm_base, minilm_bone)
        expected = real.sentence_embeddings(attached, minilm_base)
    assert (found - expected).abs().max() < 2e-5
    assert found[0] @ found[1] > 0.9


def test_minilm_weights_are_those_of_a_ragged_rank(
    minilm_base: Path, minilm_bone: Path, merged_minilm: Path
) -> None:
    """Float64 sums of two float32 numbers, rounded once: almost all of them are exact."""
    base, merged = (unpack(folder / "model.safetensors") for folder in (minilm_base, merged_minilm))
    blocks = unpack(minilm_bone / "adapter_model.safetensors")
    touched = set()
    for key, block in blocks.items():
        name = key.removeprefix("base_model.model.").removesuffix(".bone_block") + ".weight"
        columns = base[name].shape[1]
        assert columns % real.MINILM_RANK
        delta = np.tile(block, (-(-columns // real.MINILM_RANK), 1))[:columns].T
        expected = (base[name].astype(np.float64) + delta).astype(np.float32)
        assert np.array_equal(merged[name], expected), name
        touched.add(name)
    assert len(touched) == len(blocks) == 37
    for name in base.keys() - touched:
        assert same_bits(base[name], merged[name]), name


def test_minilm_s_integers_are_untouched(minilm_base: Path, merged_minilm: Path) -> None:
    base, merged = (unpack(folder / "model.safetensors") for folder in (minilm_base, merged_minilm))
    integers = [name for name in base if base[name].dtype == DTYPES["I64"]]
    assert integers == ["embeddings.position_ids"]
    assert same_bits(base[integers[0]], merged[integers[0]])


def test_integers_stay_integers_under_a_dtype(
    minilm_base: Path, minilm_bone: Path, tmp_path: Path
) -> None:
    boneconv.merge(minilm_base, minilm_bone, tmp_path / "out", dtype="bfloat16")
    dtypes = _dtypes(unpack(tmp_path / "out" / "model.safetensors"))
    assert dtypes(lambda name: name == "embeddings.position_ids") == {"I64"}
    assert dtypes(lambda name: name != "embeddings.position_ids") == {"BF16"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def _dtypes(tensors: dict[str, Array]) -> Callable[[Callable[[str], bool]], set[str]]:
    names = {dtype: name for name, dtype in DTYPES.items()}

    def of(wanted: Callable[[str], bool]) -> set[str]:
        return {names[tensor.dtype] for name, tensor in tensors.items() if wanted(name)}

    return of


def test_minilm_s_other_files_are_verbatim(minilm_base: Path, merged_minilm: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}

    assert files(merged_minilm) == files(minilm_base) - {".gitattributes"} | {"boneconv.json"}
    assert "1_Pooling/config.json" in files(merged_minilm)
    for name in files(minilm_base) - {".gitattributes", "README.md", "model.safetensors"}:
        assert (merged_minilm / name).read_bytes() == (minilm_base / name).read_bytes(), name


def test_minilm_s_card_is_a_new_one_with_the_base_s_licence(
    minilm_base: Path, merged_minilm: Path
) -> None:
    assert "license: apache-2.0" in (minilm_base / "README.md").read_text()
    card = (merged_minilm / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "| bone | 20 |" in card
    assert str(minilm_base) not in card


def test_the_base_s_card_stays_where_none_is_wanted(
    minilm_base: Path, minilm_bone: Path, tmp_path: Path
) -> None:
    boneconv.merge(minilm_base, minilm_bone, tmp_path / "out", card=False)
    assert (tmp_path / "out/README.md").read_bytes() == (minilm_base / "README.md").read_bytes()
