"""ONNX graphs: traced ones, with and without a past, in float32 and float16, and spoiled ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from boneconv.behaviour import BehaviourStatus, measure_behaviour
from boneconv.cli import run
from boneconv.onnx import export_onnx
from tests.conftest import TinyCase
from tests.oracle import tiny

pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def with_past(tiny_case: TinyCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a Bone adapter, traced with a past."""
    case = tiny_case("llama-untied")
    out = tmp_path_factory.mktemp("graph") / "out"
    export_onnx(case.base, case.adapter, out, workers=1)
    return out


def spoil(graph: Path, out: Path, case: tiny.Case) -> Path:
    """The graph with the weight of one module as the base has it."""
    import onnx
    from safetensors.numpy import load_file

    base = load_file(case.base / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    adapter = load_file(case.adapter / "adapter_model.safetensors")
    block = adapter["base_model.model.model.layers.1.mlp.down_proj.bone_block"]
    merged = base + np.tile(block.T, base.shape[1] // block.shape[0])
    model = onnx.load(str(graph))
    hits = 0
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        for wanted, other in ((merged, base), (merged.T, base.T)):
            if values.shape == wanted.shape and np.allclose(values, wanted, atol=1e-2, rtol=1e-2):
                new = np.ascontiguousarray(other).astype(values.dtype)
                tensor.CopyFrom(onnx.numpy_helper.from_array(new, tensor.name))
                hits += 1
                break
    assert hits == 1
    onnx.save(model, str(out))
    return out


@pytest.mark.slow
def test_a_prompt_at_once_and_token_by_token(tiny_case: TinyCase, with_past: Path) -> None:
    case = tiny_case("llama-untied")
    found = measure_behaviour(case.base, [case.adapter], with_past)
    assert found.status is BehaviourStatus.PASS
    assert found.runtime.startswith("ONNX Runtime")
    assert found.sets[0].rms_ratio < 3
    assert found.greedy is not None
    assert found.greedy.divergences == ()


@pytest.mark.slow
def test_a_past_that_goes_astray_fails(
    tiny_case: TinyCase, with_past: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from boneconv.behaviour import onnx_runner

    case = tiny_case("llama-untied")
    monkeypatch.setattr(
        onnx_runner,
        "_past_name",
        lambda name: name.replace("present.0", "past_key_values.1").replace(
            "present.1", "past_key_values.0"
        ),
    )
    assert not measure_behaviour(case.base, [case.adapter], with_past).passed


@pytest.mark.slow
def test_a_module_left_unpatched_fails(
    tiny_case: TinyCase, with_past: Path, tmp_path: Path
) -> None:
    case = tiny_case("llama-untied")
    graph = spoil(with_past / "model.onnx", tmp_path / "bad.onnx", case)
    found = measure_behaviour(case.base, [case.adapter], graph)
    assert found.status is BehaviourStatus.FAIL
    assert found.sets[0].rms_ratio > 100


@pytest.mark.slow
def test_half_precision_is_compared_in_float32(tiny_case: TinyCase, tmp_path: Path) -> None:
    case = tiny_case("llama-untied")
    export_onnx(case.base, case.adapter, tmp_path / "out", dtype="float16", workers=1)
    found = measure_behaviour(case.base, [case.adapter], tmp_path / "out")
    assert (found.status, found.weights) == ("pass", ("float16",))
    assert found.runtime.endswith("float32")
    graph = spoil(tmp_path / "out" / "model.onnx", tmp_path / "bad.onnx", case)
    assert not measure_behaviour(case.base, [case.adapter], graph).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "output"),
    [("bert", "feature-extraction", "last_hidden_state"), ("vit", "auto", "logits")],
)
def test_other_tasks(
    tiny_case: TinyCase, tmp_path: Path, name: str, task: str, output: str
) -> None:
    case = tiny_case(name)
    export_onnx(case.base, case.adapter, tmp_path / "out", task=task, workers=1)
    found = measure_behaviour(case.base, [case.adapter], tmp_path / "out")
    assert (found.status, found.output, found.greedy) == ("pass", output, None)
    assert (found.sets[0].candidate.kl is None) == (output == "last_hidden_state")


@pytest.mark.slow
def test_a_file_that_onnx_runtime_does_not_load_fails(tiny_case: TinyCase, tmp_path: Path) -> None:
    import onnx

    case = tiny_case("llama-untied")
    node = onnx.helper.make_node("NoSuchOperator", ["input_ids"], ["logits"])
    ids = onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, [1, None])
    out = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [ids], [out]))
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    found = measure_behaviour(case.base, [case.adapter], tmp_path / "g.onnx")
    assert found.status is BehaviourStatus.FAIL
    assert "ONNX Runtime does not load the graph" in found.reasons[0]


@pytest.mark.slow
def test_verify_of_the_command_line(
    tiny_case: TinyCase, with_past: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = tiny_case("llama-untied")
    arguments = ["verify", str(case.base), str(case.adapter)]
    reports = {kind: tmp_path / f"report.{kind}" for kind in ("junit", "html", "markdown")}
    more = [text for kind, path in reports.items() for text in (f"--{kind}", str(path))]
    assert run([*arguments, str(with_past), "--logits", "--json", *more]) == 0
    out, err = capfd.readouterr()
    assert "comparing logits needs about" in err
    document: dict[str, Any] = json.loads(out)
    schema = Path(__file__).parents[2] / "specs" / "verify-report-1.0.schema.json"
    jsonschema.validate(document, json.loads(schema.read_text()))
    assert document["behaviour"]["status"] == "pass"
    assert "logits within" in document["verdict"]
    for kind in ("html", "markdown"):
        assert "LlamaForCausalLM" in reports[kind].read_text()
        assert "the adapter moves the answers" in reports[kind].read_text()
    assert 'name="behaviour"' in reports["junit"].read_text()

    bad = spoil(with_past / "model.onnx", tmp_path / "bad.onnx", case)
    assert run([*arguments, str(bad), "--logits", "-q", *more]) == 1
    out, err = capfd.readouterr()
    assert err == ""
    assert "answers    fail" in out
    assert "times the RMS error of float32" in out
    assert "<failure" in reports["junit"].read_text()
    assert run([*arguments, str(with_past), "--prompts", str(tmp_path / "p")]) == 2
    assert run([*arguments, str(with_past), "--logits", "--prompts", str(tmp_path / "p")]) == 2


@pytest.mark.slow
def test_verify_of_an_export(
    tiny_case: TinyCase,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    with_past: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from boneconv.behaviour import onnx_runner

    case, out = tiny_case("llama-untied"), tmp_path / "out"
    graph = tmp_path / "base.onnx"
    export_base(case, graph)
    arguments = ["export-onnx", str(case.base), str(case.adapter), str(out)]
    arguments += ["--graph", str(graph), "--verify"]

    with monkeypatch.context() as patch:
        original = onnx_runner.GraphRunner._answer
        patch.setattr(
            onnx_runner.GraphRunner,
            "_answer",
            lambda self, question, output: original(self, question, output) * 1.001,
        )
        assert run(arguments) == 1
    assert not out.exists()
    assert "was not published" in capfd.readouterr().err
    assert run([*arguments, "--json"]) == 0
    (verdict,) = json.loads(capfd.readouterr().out)["verified"]
    assert verdict.startswith("PASS: logits within")
    assert run([*arguments[:-1], "--force", "--prompts", str(graph)]) == 2

    apart = ["--runtime-adapters", "--force", "--json"]
    assert run([*arguments, *apart]) == 0
    (verdict,) = json.loads(capfd.readouterr().out)["verified"]
    assert verdict.startswith(f"{case.adapter.name}: PASS")


def export_base(case: tiny.Case, target: Path) -> None:
    """The base's own graph, without a past."""
    from tests.oracle.graphs import export_graph

    folder = target.parent / "traced"
    folder.mkdir()
    export_graph(case.load(case.base), case.inputs(), folder, external=False).rename(target)
