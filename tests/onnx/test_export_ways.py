"""`export_onnx` without a graph: merged in the graph's dtype, traced, built, or adapters apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from boneconv import export_onnx, verify
from boneconv.onnx.runtime.session import AdapterSession
from tests.conftest import TinyCase
from tests.oracle.tiny import Case
from tests.progress import Told


@pytest.fixture(scope="module")
def case(tiny_case: TinyCase) -> Case:
    """A base in half precision, where a merge in between would show."""
    return tiny_case("qwen2", variant="bat", base_dtype="bfloat16")


@pytest.mark.slow
def test_a_traced_graph_holds_the_merge_rounded_once_to_its_own_dtype(
    case: Case, tmp_path: Path
) -> None:
    told = Told()
    result = export_onnx(case.base, case.adapter, tmp_path / "out", workers=1, progress=told)
    assert result.method == "trace"
    assert told.total == sum(told.done) > 0
    report = verify(case.base, case.adapter, tmp_path / "out", tolerance="canonical")
    assert report.passed, report.findings
    record = json.loads((tmp_path / "out" / "boneconv.json").read_text())
    assert (record["numerics"], record["options"]["dtype"]) == ("canonical", "float32")
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.slow
def test_adapters_apart_from_a_traced_graph(tiny_case: TinyCase, tmp_path: Path) -> None:
    import torch

    case = tiny_case("llama-untied")
    export_onnx(case.base, case.adapter, tmp_path / "out", runtime_adapters=True, workers=1)
    (adapter,) = (tmp_path / "out" / "adapters").iterdir()
    session = AdapterSession(tmp_path / "out" / "model.onnx")
    session.load("tuned", adapter)
    ids = case.inputs()["input_ids"]
    feeds = _feeds(session, np.asarray(ids))
    with torch.no_grad():
        wanted = case.peft_model()(input_ids=ids).logits.numpy()
    tuned = session.run(["logits"], feeds, adapter="tuned")[0]
    base = session.run(["logits"], feeds)[0]
    assert np.abs(tuned - wanted).max() < 1e-4
    assert np.abs(base - wanted).max() > 1e-2


def _feeds(session: AdapterSession, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Of a prompt, with nothing past."""
    batch, length = ids.shape
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for given in session.session.get_inputs():
        if given.name.startswith("past_key_values"):
            shape = [size if isinstance(size, int) else 0 for size in given.shape]
            feeds[given.name] = np.zeros((batch, shape[1], 0, shape[3]), np.float32)
        elif given.name == "position_ids":
            feeds[given.name] = np.tile(np.arange(length), (batch, 1))
    return feeds
