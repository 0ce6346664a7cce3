"""Folders for onnxruntime-genai, made by its builder from a merged checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from boneconv import merge, pretrained
from boneconv.errors import CheckFailedError, InputError, MissingExtraError, UsageError
from boneconv.onnx.tracing.genai import build_genai
from tests.conftest import TinyCase
from tests.oracle import real
from tests.oracle.graphs import genai_generate

pytest.importorskip("onnxruntime_genai", reason="the extra genai is not installed")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose heads are as wide as the runtime asks for."""
    return make_llama(tmp_path_factory.mktemp("genai") / "merged", heads=4)


def make_llama(out: Path, heads: int) -> Path:
    """A random Llama of width 64, and a tokenizer of one word a token."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(heads)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(128)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(out)
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.slow
def test_the_runtime_says_what_torch_says(merged: Path, out: Path) -> None:
    said: list[str] = []
    summary = build_genai(merged, out, note=said.append)
    ids, end = [5, 17, 99, 30], 2
    wanted = real.generate(real.load_smollm2(merged), ids)
    assert len(set(wanted)) > 4
    assert genai_generate(out, ids, end) == wanted
    assert said == ["building needs about 0.8 GB of memory"]
    assert (summary.provider, summary.dtype, summary.notes) == ("cpu", "float32", ())
    assert summary.matrices == 1 + 2 * 7
    names = {path.name for path in out.iterdir()}
    assert {"genai_config.json", "model.onnx", "tokenizer.json"} <= names
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_model_that_the_builder_does_not_know_is_refused_with_its_reason(
    tiny_case: TinyCase, merged: Path, out: Path
) -> None:
    base = Path(shutil.copytree(tiny_case("gpt-neox").base, out.parent / "base"))
    for tokenizer in merged.glob("tokenizer*"):
        shutil.copy(tokenizer, base)
    with pytest.raises(InputError, match=r"builder does not take.*GPTNeoX|not currently supported"):
        build_genai(base, out)


@pytest.mark.slow
def test_a_folder_that_loads_but_does_not_run_is_refused(tmp_path: Path, out: Path) -> None:
    base = make_llama(tmp_path / "base", heads=8)
    with pytest.raises(CheckFailedError, match="head_size shall be a multiple of 16"):
        build_genai(base, out)


def test_a_dtype_that_cannot_be_is_refused(merged: Path, out: Path) -> None:
    with pytest.raises(UsageError, match=r"float16.*'int4'"):
        build_genai(merged, out, dtype="int4")


@pytest.mark.parametrize("library", ["onnxruntime_genai", "transformers"])
def test_a_missing_library_is_named_with_the_extra(
    merged: Path, out: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == library else name)
    with pytest.raises(MissingExtraError, match=rf"{library}.*pip install 'boneconv\[genai\]'"):
        build_genai(merged, out)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_smollm2_says_what_peft_says(
    cache: Path, real_base: Path, tmp_path: Path, out: Path, variant: real.Variant
) -> None:
    merge(real_base, real.trained(cache, variant), tmp_path / "merged", dtype="float32")
    summary = build_genai(tmp_path / "merged", out)
    ids = real.prompt(real_base)
    end = json.loads((real_base / "config.json").read_text())["eos_token_id"]
    assert real.reference(cache, variant).agrees(genai_generate(out, ids, end))
    assert summary.matrices == 1 + 210
