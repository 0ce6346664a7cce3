"""Graphs of real exporters, patched: they answer as PEFT does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boneconv import merge
from boneconv.errors import ShapeError
from boneconv.graphs import missing_weights, open_graph
from boneconv.io.checkpoint import open_checkpoint
from boneconv.onnx import export_onnx
from tests.conftest import TinyCase
from tests.oracle import real, tiny
from tests.oracle.graphs import (
    Kind,
    export_graph,
    genai_generate,
    graph_generate,
    graph_outputs,
    smollm2_graph,
)

#: What float32 logits of order one may differ by between ONNX Runtime and torch.
NEAR = 2e-4


def _patched(case: tiny.Case, tmp_path: Path, **how: Any) -> tuple[Path, np.ndarray[Any, Any]]:
    """A tiny base's graph patched with its adapter, and what it answers."""
    traced = tmp_path / "traced"
    traced.mkdir()
    export_graph(case.load(case.base), case.inputs(), traced, **how)
    result = export_onnx(case.base, case.adapter, tmp_path / "out", graph=traced / "model.onnx")
    assert result.method == "patch"
    return result.graph, graph_outputs(result.graph, case.inputs())[0]


def _answers_as_peft(case: tiny.Case, tmp_path: Path, **how: Any) -> None:
    _, found = _patched(case, tmp_path, **how)
    expected = tiny.peft_logits(case).numpy()
    assert np.abs(found - expected).max() < NEAR
    assert np.abs(tiny.base_logits(case).numpy() - expected).max() > 100 * NEAR


@pytest.mark.slow
def test_a_language_model_whose_weights_were_transposed(
    tiny_case: TinyCase, tmp_path: Path
) -> None:
    _answers_as_peft(tiny_case("llama-tied", variant="bat"), tmp_path, optimize=True)


@pytest.mark.slow
def test_an_encoder_whose_graph_holds_its_weights(tiny_case: TinyCase, tmp_path: Path) -> None:
    _answers_as_peft(tiny_case("bert"), tmp_path, external=False)


@pytest.mark.slow
def test_a_head_that_shared_its_weights_with_the_embedding_gets_its_own(
    tiny_case: TinyCase, tmp_path: Path
) -> None:
    _answers_as_peft(tiny_case("llama-lm-head"), tmp_path)
    record = json.loads((tmp_path / "out" / "boneconv.json").read_text())
    (place,) = record["tensors"]["lm_head.weight"]["places"]
    assert place["initializer"].endswith("_untied")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "gpt-neox", "vit", "llama-untied", "opt-headless"])
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_other_architectures(
    tiny_case: TinyCase, tmp_path: Path, name: str, optimize: bool, variant: tiny.Variant
) -> None:
    _answers_as_peft(tiny_case(name, variant=variant), tmp_path, optimize=optimize)


@pytest.mark.slow
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(
    "name", ["llama-lm-head", "llama-embedding", "llama-embedding-and-lm-head"]
)
def test_saved_and_adapted_heads(
    tiny_case: TinyCase, tmp_path: Path, name: str, optimize: bool
) -> None:
    _answers_as_peft(tiny_case(name), tmp_path, optimize=optimize)


@pytest.mark.slow
def test_a_resized_vocabulary_is_refused(tiny_case: TinyCase, tmp_path: Path) -> None:
    case = tiny_case("llama-resized")
    traced = tmp_path / "traced"
    traced.mkdir()
    plain = tiny_case("llama-tied")
    export_graph(plain.load(plain.base), plain.inputs(), traced)
    with pytest.raises(ShapeError, match="the graph is made for the old") as caught:
        export_onnx(case.base, case.adapter, tmp_path / "out", graph=traced / "model.onnx")
    assert "Leave out --graph" in str(caught.value)


KINDS: tuple[Kind, ...] = ("torch", "torch-optimized", "exporter", "exporter-fused", "genai-fp32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_smollm2_says_what_peft_says(
    cache: Path, real_base: Path, tmp_path: Path, kind: Kind, variant: real.Variant
) -> None:
    out = _export_smollm2(cache, real_base, tmp_path, kind, variant)
    end = real.answer(real_base)[-1]
    said = graph_generate(out / "model.onnx", real.prompt(real_base), end)
    assert real.reference(cache, variant).agrees(said)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_smollm2_in_onnxruntime_genai(
    cache: Path, real_base: Path, tmp_path: Path, variant: real.Variant
) -> None:
    out = _export_smollm2(cache, real_base, tmp_path, "genai-fp32", variant)
    end = real.answer(real_base)[-1]
    said = genai_generate(out, real.prompt(real_base), end)
    assert real.reference(cache, variant).agrees(said)


@pytest.mark.slow
def test_a_half_precision_graph_holds_what_a_merge_in_its_dtype_gives(
    cache: Path, real_base: Path, trained_bat: Path, tmp_path: Path
) -> None:
    """ONNX Runtime's CPU provider cannot run the builder's float16 graphs, patched or not."""
    out = _export_smollm2(cache, real_base, tmp_path, "genai-fp16", "bat")
    merge(real_base, trained_bat, tmp_path / "merged", dtype="float16")
    merged = open_checkpoint(tmp_path / "merged").tensors
    graph = open_graph(out / "model.onnx")
    assert missing_weights(graph, merged) == []
    assert len(missing_weights(graph, open_checkpoint(real_base).tensors)) == 210


def _export_smollm2(
    cache: Path, base: Path, tmp_path: Path, kind: Kind, variant: real.Variant
) -> Path:
    graph = smollm2_graph(cache, kind)
    adapter = real.trained(cache, variant)
    result = export_onnx(base, adapter, tmp_path / "out", graph=graph / "model.onnx")
    assert result.weights == 210
    return result.out
