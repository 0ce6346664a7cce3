"""The export-onnx command: what it prints, its exit codes, and what it does not load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from boneconv.cli import run
from tests.builders import snapshot
from tests.onnx.patching.cases import Case, check_here, expected, make_case, same_weights

__all__ = ["check_here"]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


def _arguments(case: Case, out: Path, *more: str) -> list[str]:
    inputs = [str(case.base), str(case.adapter), str(out), "--graph", str(case.graph)]
    return ["export-onnx", *inputs, *more]


@pytest.mark.usefixtures("check_here")
def test_a_line_about_the_result(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(_arguments(case, tmp_path / "out")) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path / 'out'}: 6 weights of the graph written, ")
    assert printed.err == ""
    assert same_weights(tmp_path / "out" / "model.onnx", expected(np.float32))


@pytest.mark.usefixtures("check_here")
def test_json(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(_arguments(case, tmp_path / "out", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "patch"
    assert found["weights"] == 6
    assert found["graph"] == str(tmp_path / "out" / "model.onnx")
    assert found["files"] == sorted(snapshot(tmp_path / "out"))
    assert found["bytes"] == sum(map(len, snapshot(tmp_path / "out").values()))


@pytest.mark.usefixtures("check_here")
def test_a_second_run_needs_force(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(_arguments(case, tmp_path / "out")) == 0
    assert run(_arguments(case, tmp_path / "out")) == 2
    assert "--force" in capsys.readouterr().err
    assert run(_arguments(case, tmp_path / "out", "--force")) == 0


def test_a_wrong_graph_is_bad_input(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_case(tmp_path / "other", weights={"w": np.ones((3, 4), np.float32)})
    mixed = Case(case.base, case.adapter, other.graph)
    assert run(_arguments(mixed, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert "not of this base" in error
    assert not list(tmp_path.glob("out*"))


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export-onnx", "--help"]) == 0
    assert "boneconv export-onnx ./SmolLM2-135M" in capsys.readouterr().out


def test_patching_loads_neither_torch_nor_transformers(case: Case, tmp_path: Path) -> None:
    code = (
        "import sys; from boneconv.cli import run; assert run(sys.argv[1:]) == 0; "
        "found = {name.split('.')[0] for name in sys.modules}; "
        "assert not found & {'torch', 'transformers', 'onnxruntime', 'huggingface_hub'}, found"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *_arguments(case, tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
