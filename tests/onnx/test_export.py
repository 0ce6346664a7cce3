"""The export workflow: what OUT holds, when it appears, and which options go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boneconv import ExportResult, convert, export_onnx
from boneconv.digest import stored_digest
from boneconv.errors import (
    BaseMismatchError,
    CheckFailedError,
    FormatError,
    OutputExistsError,
    UsageError,
)
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.files import Reader
from tests.builders import Q, make_base, module, snapshot, tree_digest
from tests.graphs.onnx_files import DATA, hub_snapshot, make_graph
from tests.onnx.patching.cases import (
    Case,
    check_here,
    expected,
    float_tensors,
    graph_weights,
    make_case,
    same_weights,
)

__all__ = ["check_here"]


pytestmark = pytest.mark.usefixtures("check_here")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path, files={"chat_template.jinja": "the adapter's"})


def _export(case: Case, out: Path, **options: Any) -> ExportResult:
    return export_onnx(case.base, case.adapter, out, graph=case.graph, **options)


def test_the_whole_of_a_folder(case: Case, tmp_path: Path) -> None:
    result = _export(case, tmp_path / "out")
    assert set(snapshot(tmp_path / "out")) == {
        "model.onnx",
        DATA,
        "boneconv.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    }
    assert result.files == tuple(sorted(snapshot(tmp_path / "out")))
    assert (result.method, result.weights) == ("patch", 6)
    assert result.graph == tmp_path / "out" / "model.onnx"
    assert "the base's" not in (tmp_path / "out" / "README.md").read_text()
    assert not list(tmp_path.glob("*.partial*"))


def test_one_file_where_the_graph_holds_its_weights(tmp_path: Path) -> None:
    case = make_case(tmp_path, storage="raw")
    result = _export(case, tmp_path / "merged.onnx")
    assert result.graph == result.out == tmp_path / "merged.onnx"
    assert result.record == tmp_path / "merged.onnx.boneconv.json"
    assert json.loads(result.record.read_text())["export"] == "patch"
    assert same_weights(result.out, expected(np.float32))


def test_a_graph_with_external_data_is_no_single_file(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its export is a folder"):
        _export(case, tmp_path / "merged.onnx")
    assert not list(tmp_path.glob("merged*"))


def test_the_record(case: Case, tmp_path: Path) -> None:
    record = json.loads(_export(case, tmp_path / "out").record.read_text())
    assert record["numerics"] == "canonical"
    assert [entry["variant"] for entry in record["adapters"]] == ["bone"]
    assert len(record["tensors"]) == 6
    name = f"{module(1, Q)}.weight"
    stored = open_checkpoint(case.base).tensors[name]
    with Reader(stored.path) as reader:
        assert record["tensors"][name]["base_digest"] == stored_digest(stored, reader)
    (place,) = record["tensors"][name]["places"]
    assert place == {
        "initializer": name,
        "dtype": "F32",
        "transposed": False,
        "digest": tree_digest("F32", expected(np.float32)[name]),
    }


def test_two_exports_are_equal(case: Case, tmp_path: Path) -> None:
    _export(case, tmp_path / "one")
    _export(case, tmp_path / "two")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_more_adapters_are_applied_in_order(tmp_path: Path) -> None:
    case = make_case(tmp_path, "bat")
    other = make_case(tmp_path / "other", "bone").adapter
    one = export_onnx(case.base, case.adapter, tmp_path / "1", more=[other], graph=case.graph)
    two = export_onnx(case.base, other, tmp_path / "2", more=[case.adapter], graph=case.graph)
    assert not same_weights(one.graph, expected(np.float32))
    assert (tmp_path / "1" / DATA).read_bytes() != (tmp_path / "2" / DATA).read_bytes()
    assert len(json.loads(two.record.read_text())["adapters"]) == 2


def test_out_is_not_replaced_without_force(case: Case, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputExistsError):
        _export(case, tmp_path / "out")
    assert snapshot(tmp_path / "out") == {"mine": b"mine"}
    _export(case, tmp_path / "out", force=True)
    assert "mine" not in snapshot(tmp_path / "out")


def test_the_check_sees_the_complete_output_and_can_stop_it(case: Case, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def check(path: Path) -> None:
        seen.append({str(each.relative_to(path)) for each in path.rglob("*") if each.is_file()})
        raise CheckFailedError("not good enough")

    with pytest.raises(CheckFailedError, match="not good enough"):
        _export(case, tmp_path / "out", check=check)
    assert {"model.onnx", DATA, "boneconv.json", "tokenizer.json"} <= seen[0]
    assert not list(tmp_path.glob("out*"))


def test_an_interrupt_publishes_nothing_and_the_next_run_starts_anew(
    case: Case, tmp_path: Path
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _export(case, tmp_path / "out", check=interrupt)
    assert not (tmp_path / "out").exists()
    _export(case, tmp_path / "out")
    assert same_weights(tmp_path / "out" / "model.onnx", expected(np.float32))


def test_a_snapshot_of_the_hub_is_patched_through_its_links(case: Case, tmp_path: Path) -> None:
    files = {"onnx/model.onnx": case.graph, f"onnx/{DATA}": case.graph.with_name(DATA)}
    folder = hub_snapshot(tmp_path / "hub", files)
    linked = Case(case.base, case.adapter, folder / "onnx" / "model.onnx")
    out = _export(linked, tmp_path / "out").graph
    assert same_weights(out, expected(np.float32))
    assert not out.is_symlink()
    assert not out.with_name(DATA).is_symlink()


def test_a_runtimes_configuration_keeps_the_graphs_name(case: Case, tmp_path: Path) -> None:
    graph = case.graph.rename(case.graph.with_name("decoder.onnx"))
    graph.with_name("genai_config.json").write_text('{"model": {}}')
    result = export_onnx(case.base, case.adapter, tmp_path / "out", graph=graph)
    assert result.graph.name == "decoder.onnx"
    assert (tmp_path / "out" / "genai_config.json").read_text() == '{"model": {}}'


def test_an_adapter_made_for_another_base(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    convert(case.adapter, tmp_path / "native", to="native", base=case.base)
    native = Case(case.base, tmp_path / "native", case.graph)
    assert same_weights(_export(native, tmp_path / "good").graph, expected(np.float32))
    tensors = float_tensors(seed=9)
    base = make_base(tmp_path / "strange", tensors)
    graph = make_graph(tmp_path / "g" / "model.onnx", graph_weights(tensors, np.float32))
    strange = Case(base, tmp_path / "native", graph)
    with pytest.raises(BaseMismatchError, match="R30"):
        _export(strange, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    result = _export(strange, tmp_path / "out", allow_base_mismatch=True)
    assert any("made for" in text for text in result.notes)
    assert json.loads(result.record.read_text())["fingerprint_ignored"] is True


def test_quantised_graphs_are_refused(case: Case, tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    model = onnx.load(case.graph, load_external_data=False)
    model.graph.node.append(
        helper.make_node("MatMulNBits", ["a", "b", "c"], ["d"], domain="com.microsoft")
    )
    case.graph.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match="found MatMulNBits"):
        _export(case, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "keeps its own dtype"),
        ({"task": "fill-mask", "opset": 20}, "keeps its own task, opset"),
        ({"runtime": "genai"}, "keeps its own runtime"),
        ({"bat_activation": True}, "adapters at run time"),
        ({"runtime": "other"}, "no runtime that has a folder"),
    ],
)
def test_options_that_do_not_go_together(
    case: Case, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        _export(case, tmp_path / "out", **options)


def test_an_output_that_holds_an_input_is_refused(case: Case, tmp_path: Path) -> None:
    for out in (case.graph.parent, case.base, case.base / "out", case.adapter):
        with pytest.raises(UsageError, match="must not be, hold or lie in an input"):
            _export(case, out, force=True)


def test_files_of_the_output_are_new(case: Case, tmp_path: Path) -> None:
    """Hard links to the graph's own data would change it, and ONNX refuses them."""
    _export(case, tmp_path / "out")
    assert (tmp_path / "out" / DATA).stat().st_nlink == 1
