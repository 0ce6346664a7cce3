"""What tracing is asked for, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from boneconv import pretrained
from boneconv.errors import (
    CheckFailedError,
    FormatError,
    InputError,
    MissingExtraError,
    NameMatchError,
    UsageError,
)
from boneconv.onnx.tracing import exporter, trace
from boneconv.onnx.tracing.exporter import Traced
from boneconv.onnx.tracing.trace import TraceSummary, trace_graph
from tests.conftest import TinyCase
from tests.oracle.graphs import graph_session

Copy = Callable[[str], Path]


@pytest.fixture
def copied(tiny_case: TinyCase, tmp_path: Path) -> Copy:
    """A tiny base in a folder that a test may change."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_case(name).base, tmp_path / "base"))

    return copy


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def add_tensor(folder: Path, name: str, tensor: np.ndarray[Any, Any]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: tensor}, folder / "model.safetensors", metadata={"format": "pt"})


def float_types(graph: Path) -> set[int]:
    floats = {1: onnx.TensorProto.FLOAT, 10: onnx.TensorProto.FLOAT16, 16: 16}
    tensors = onnx.load(graph).graph.initializer
    return {t.data_type for t in tensors if t.data_type in floats and len(t.dims) == 2}


def opset(summary: TraceSummary) -> int:
    """The opset that the file names, which is the one that the summary says."""
    (imported,) = onnx.load(summary.graph, load_external_data=False).opset_import
    assert imported.version == summary.opset
    return summary.opset


@pytest.mark.slow
def test_half_precision_weights(tiny_case: TinyCase, out: Path) -> None:
    case = tiny_case("vit")
    summary = trace_graph(case.base, out, dtype="float16")
    assert float_types(summary.graph) == {onnx.TensorProto.FLOAT16}
    pixels = np.ones((3, 3, 16, 16), np.float16)
    (found,) = graph_session(summary.graph).run(None, {"pixel_values": pixels})
    import torch

    wanted = case.load(case.base)(pixel_values=torch.ones(3, 3, 16, 16)).logits.detach().numpy()
    assert found.dtype == np.float16
    assert np.abs(found - wanted).max() < 0.01 * np.abs(wanted).max()


@pytest.mark.slow
def test_bfloat16_weights_come_with_a_warning(tiny_case: TinyCase, out: Path) -> None:
    said: list[str] = []
    summary = trace_graph(tiny_case("vit").base, out, dtype="bfloat16", opset=23, note=said.append)
    assert float_types(summary.graph) == {onnx.TensorProto.BFLOAT16}
    assert "bfloat16 kernels" in said[-1]
    assert summary.notes == (said[-1],)
    assert opset(summary) == 23


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph(
    tiny_case: TinyCase, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "_INLINE", 1000)
    case = tiny_case("vit")
    summary = trace_graph(case.base, out, opset=18)
    assert opset(summary) == 18
    assert summary.data == out / "model.onnx.data"
    assert summary.data.stat().st_size > 40_000
    assert summary.graph.stat().st_size < 100_000
    graph_session(summary.graph)


@pytest.mark.slow
def test_what_lies_beside_the_weights_comes_along(
    copied: Copy, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = copied("vit")
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
        (base / name).write_text("{}")
    for name in ("README.md", "boneconv.json", "modeling_vit.py"):
        (base / name).write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    capfd.readouterr()
    summary = trace_graph(base, out)
    names = {"config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"}
    assert {str(path.relative_to(out)) for path in summary.side_files} == {
        *names,
        "1_Pooling/config.json",
    }
    assert {path.name for path in out.iterdir()} == {*names, "1_Pooling", "model.onnx"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_task_drops_the_weights_it_has_no_use_for(copied: Copy, out: Path) -> None:
    base = copied("bert")
    add_tensor(base, "bert.embeddings.position_ids", np.arange(64)[None])
    summary = trace_graph(base, out, task="feature-extraction")
    assert set(summary.dropped) == {
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    }
    assert summary.weights == 37
    outputs = graph_session(summary.graph).get_outputs()
    assert [(o.name, o.shape) for o in outputs] == [
        ("last_hidden_state", ["batch_size", "sequence_length", 32])
    ]


def test_a_head_that_the_checkpoint_lacks_is_not_made_up(tiny_case: TinyCase, out: Path) -> None:
    with pytest.raises(NameMatchError, match=r"no classifier\.bias, classifier\.weight.*--task"):
        trace_graph(tiny_case("bert-headless").base, out, task="text-classification")
    assert not list(out.iterdir())


@pytest.mark.slow
def test_a_weight_that_changed_on_the_way_is_named(
    tiny_case: TinyCase, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trace.trace_plain

    def faulty(*args: Any, **options: Any) -> Traced:
        import onnx_ir

        traced = plain(*args, **options)
        value = traced.graph.graph.initializers["classifier.weight"]
        changed = value.const_value.numpy().copy()
        changed[-1, -1] = np.nextafter(changed[-1, -1], np.float32(9))
        value.const_value = onnx_ir.tensor(changed, name=value.name)
        return traced

    monkeypatch.setattr(trace, "trace_plain", faulty)
    with pytest.raises(CheckFailedError, match=r"'classifier\.weight'.*all but 1"):
        trace_graph(tiny_case("vit").base, out)


def test_code_of_the_checkpoint_is_never_run(copied: Copy, out: Path) -> None:
    base = copied("vit")
    marker = base / "ran"
    (base / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    automatic = {
        "AutoConfig": "modeling_own.C",
        "AutoModelForImageClassification": "modeling_own.M",
    }
    edit_config(base, model_type="own", auto_map=automatic)
    with pytest.raises(InputError, match="never run"):
        trace_graph(base, out)
    assert not marker.exists()


@pytest.mark.parametrize("opset", [7, 17, 99])
def test_an_opset_that_cannot_be_is_refused(tiny_case: TinyCase, out: Path, opset: int) -> None:
    with pytest.raises(UsageError, match=f"18 to .*found {opset}"):
        trace_graph(tiny_case("vit").base, out, opset=opset)


def test_a_dtype_that_cannot_be_is_refused(tiny_case: TinyCase, out: Path) -> None:
    with pytest.raises(UsageError, match=r"bfloat16.*'int4'"):
        trace_graph(tiny_case("vit").base, out, dtype="int4")


def test_models_of_two_parts_are_refused(tiny_case: TinyCase, out: Path) -> None:
    with pytest.raises(UsageError, match="encoder and a decoder"):
        trace_graph(tiny_case("t5").base, out)


def test_models_of_texts_and_images_are_refused(tiny_case: TinyCase, out: Path) -> None:
    with pytest.raises(UsageError, match="only models of text or of images"):
        trace_graph(tiny_case("llava").base, out, task="feature-extraction")


def test_a_task_that_the_model_is_not_of_is_refused(tiny_case: TinyCase, out: Path) -> None:
    with pytest.raises(InputError, match=r"cannot load.*fill-mask.*--task"):
        trace_graph(tiny_case("llama-tied").base, out, task="fill-mask")


def test_only_a_folder_is_traced(tiny_case: TinyCase, out: Path) -> None:
    file = tiny_case("vit").base / "model.safetensors"
    with pytest.raises(InputError, match="only a folder"):
        trace_graph(file, out)


def test_a_folder_without_weights_is_refused(tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="no safetensors weights"):
        trace_graph(tmp_path / "empty", out)


@pytest.mark.parametrize("library", ["transformers", "onnxscript"])
def test_a_missing_library_is_named_with_the_extra(
    tiny_case: TinyCase, out: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == library else name)
    with pytest.raises(MissingExtraError, match=rf"{library}.*pip install 'boneconv\[transformers"):
        trace_graph(tiny_case("vit").base, out)


@pytest.mark.slow
def test_an_untried_transformers_is_passed_over(
    tiny_case: TinyCase, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own exporter then makes a graph of the same inputs, outputs and answers."""
    monkeypatch.setattr(exporter, "TRIED", ("4.57",))
    case = tiny_case("llama-tied")
    summary = trace_graph(case.base, out)
    assert summary.exporter.startswith("torch.onnx")
    (remark,) = summary.notes
    assert "untried here (tried: 4.57)" in remark
    session = graph_session(summary.graph)
    assert [given.name for given in session.get_inputs()] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{n}.{part}" for n in range(2) for part in ("key", "value")),
    ]
    assert session.get_inputs()[3].shape == ["batch_size", 2, "past_sequence_length", 8]
    ids = np.array([[5, 9, 7, 30]])
    first = _say(session, ids[:, :3], None)
    second = _say(session, ids[:, 3:], first)
    import torch

    wanted = case.load(case.base)(torch.tensor(ids)).logits.detach().numpy()
    found = np.concatenate([first["logits"], second["logits"]], axis=1)
    assert np.abs(found - wanted).max() < 2e-6 * np.abs(wanted).max()


def _say(session: Any, ids: np.ndarray[Any, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    none = np.zeros((1, 2, 0, 8), np.float32)
    past = {
        given.name: none
        if before is None
        else before[given.name.replace("past_key_values", "present")]
        for given in session.get_inputs()
        if given.name.startswith("past")
    }
    done = next(iter(past.values())).shape[2]
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones((1, done + ids.shape[1]), np.int64),
        "position_ids": np.arange(done, done + ids.shape[1])[None],
        **past,
    }
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def test_a_failing_exporter_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def export(self, *args: Any) -> Any:
            raise RuntimeError("Constraints violated\nand so on")

    plain = Traced(graph=object(), exporter="torch")
    monkeypatch.setattr(exporter, "_onnx_exporter", lambda version: (Failing, dict))
    monkeypatch.setattr(exporter, "_cache", lambda past, model: None)
    monkeypatch.setattr(exporter, "trace_plain", lambda *args, **options: plain)
    said: list[str] = []
    sample = exporter.Sample({}, {})
    assert exporter.trace_with_past(None, sample, opset=20, note=said.append) is plain
    (remark,) = said
    assert "cannot export" in remark
    assert "Constraints violated" in remark
    assert "and so on" not in remark
