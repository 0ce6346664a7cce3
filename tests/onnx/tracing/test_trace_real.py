"""Real models traced with trained adapters: they answer as PEFT does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from boneconv import merge
from boneconv.onnx.tracing.trace import predict_memory, trace_graph
from tests.oracle import real
from tests.oracle.graphs import graph_generate, graph_session

pytestmark = pytest.mark.slow

#: Traces in a process of its own and says how much memory that took at its peak, in bytes.
_MEASURED = """
import pathlib, re, sys
from boneconv.onnx.tracing.trace import trace_graph
summary = trace_graph(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss counts the parent's too
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) * 1024
print(peak, summary.predicted_memory, summary.weights)
"""


@dataclass(frozen=True)
class Traced:
    """SmolLM2 with an adapter: where its graph lies, and what tracing took."""

    folder: Path
    peak: int
    predicted: int
    weights: int
    expected: real.Generation


@pytest.fixture(scope="module", params=["bone", "bat"])
def traced(
    cache: Path,
    real_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Traced:
    root = tmp_path_factory.mktemp(request.param)
    merge(real_base, real.trained(cache, request.param), root / "merged", dtype="float32")
    out = root / "out"
    out.mkdir()
    command = [sys.executable, "-c", _MEASURED, str(root / "merged"), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, predicted, weights = map(int, done.stdout.split())
    return Traced(out, peak, predicted, weights, real.reference(cache, request.param))


def test_smollm2_says_what_peft_says(traced: Traced, real_base: Path) -> None:
    end = json.loads((real_base / "config.json").read_text())["eos_token_id"]
    said = graph_generate(traced.folder / "model.onnx", real.prompt(real_base), end)
    assert traced.expected.agrees(said), real.text(real_base, said)


def test_the_folder_holds_what_a_runtime_needs(traced: Traced, real_base: Path) -> None:
    names = {path.name for path in traced.folder.iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"} <= names
    assert real.prompt(traced.folder) == real.prompt(real_base)


def test_every_weight_was_found(traced: Traced) -> None:
    assert traced.weights == 272


def test_memory_is_predicted(traced: Traced) -> None:
    assert 0.7 * traced.predicted < traced.peak < 1.1 * traced.predicted


def test_minilm_embeds_as_peft_does(minilm_base: Path, minilm_bone: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    merge(minilm_base, minilm_bone, tmp_path / "merged")
    (tmp_path / "out").mkdir()
    summary = trace_graph(tmp_path / "merged", tmp_path / "out")
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(
        list(real.SENTENCES), padding=True, return_tensors="np"
    )
    session = graph_session(summary.graph)
    given = {node.name: batch[node.name] for node in session.get_inputs()}
    (hidden,) = session.run(["last_hidden_state"], given)
    mask = batch["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    found = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    model = real.peft_minilm(minilm_base, minilm_bone)
    wanted = real.sentence_embeddings(model, minilm_base).detach().numpy()
    assert np.abs(found - wanted).max() < 1e-6
    assert summary.dropped == ("pooler.dense.bias", "pooler.dense.weight")


def test_the_prediction_grows_with_the_dtype(real_base: Path) -> None:
    from boneconv.io.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(real_base)
    full, half = (predict_memory(checkpoint, dtype) for dtype in ("float32", "float16"))
    assert full - half == pytest.approx(1.1 * 134_515_008 * 2, rel=0.001)
