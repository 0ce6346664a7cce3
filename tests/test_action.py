"""The GitHub action: its steps, run as shell on the demo's model, with hostile names too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from junitparser import JUnitXml
from onnx import TensorProto, helper, numpy_helper

from boneconv.demo import demo
from boneconv.io.checkpoint import open_checkpoint
from tests.builders import snapshot

ROOT = Path(__file__).parents[1]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS: dict[str, dict[str, Any]] = {step["name"]: step for step in ACTION["runs"]["steps"]}
INPUT = re.compile(r"\$\{\{ inputs\.([a-z-]+) \}\}")
HOSTILE = "it's $(touch pwned) `touch pwned`; touch pwned #"
ENVIRONMENT = "boneconv-environment"


class Runner:
    """Does what GitHub does with an action: inputs into environments, conditions, outputs."""

    def __init__(self, folder: Path, inputs: dict[str, str]) -> None:
        declared = ACTION["inputs"]
        assert set(inputs) <= set(declared)
        self.inputs = {name: str(each.get("default", "")) for name, each in declared.items()}
        self.inputs |= inputs
        self.folder, self.temp = folder, folder / "runner temp"
        self.temp.mkdir(exist_ok=True)
        self.summary = self.temp / "summary.md"
        self.log = ""

    def run(self, name: str, **environment: str) -> int:
        step = STEPS[name]
        if not self._wanted(step.get("if", "${{ true }}")):
            return 0
        own = {key: INPUT.sub(self._value, text) for key, text in step.get("env", {}).items()}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-euo", "pipefail", "-c", step["run"]],
            cwd=self.folder,
            env=os.environ | self._github() | environment | own,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        self.log = done.stdout + done.stderr
        return done.returncode

    def all(self) -> None:
        """The steps after the installation."""
        for name in list(STEPS)[1:]:
            assert self.run(name) == 0, self.log

    def outputs(self) -> dict[str, str]:
        lines = (self.temp / "output").read_text(encoding="utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines)

    def _github(self) -> dict[str, str]:
        return {
            "RUNNER_TEMP": str(self.temp),
            "GITHUB_OUTPUT": str(self.temp / "output"),
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }

    def _value(self, found: re.Match[str]) -> str:
        return self.inputs[found[1]]

    def _wanted(self, condition: str) -> bool:
        terms = condition.removeprefix("${{ ").removesuffix(" }}").split(" && ")
        return all(self._holds(*term.split()) for term in terms if term != "true")

    def _holds(self, name: str, operator: str, text: str) -> bool:
        equal = self.inputs[name.removeprefix("inputs.")] == text.strip("'")
        return equal if operator == "==" else not equal


def installed(runner: Runner) -> Runner:
    """The environment that the first step makes, without its seconds."""
    scripts = runner.temp / ENVIRONMENT / "bin"
    scripts.mkdir(parents=True)
    shim = scripts / "boneconv"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{_MAIN}" "$@"\n')
    shim.chmod(0o755)
    return runner


_MAIN = "from boneconv.cli import main; main()"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo's model and adapters."""
    demo(tmp_path)
    return tmp_path


def make_graph(base: Path, out: Path) -> None:
    """A graph of the base's three linear layers, one after the other."""
    tensors = open_checkpoint(base).tensors
    nodes, weights, last = [], [], "x"
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        weight = tensors[f"model.layers.0.{name}.weight"].read().astype(np.float32)
        weights.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), name))
        nodes.append(helper.make_node("MatMul", [last, name], [f"{name}.out"]))
        last = f"{name}.out"
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 12]) for name in ("x", last)
    ]
    graph = helper.make_graph(nodes, "demo", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, out)


# --- what is written down ---------------------------------------------------------------------


def test_no_input_is_pasted_into_a_script() -> None:
    assert ACTION["runs"]["using"] == "composite"
    for step in STEPS.values():
        assert "${{" not in step["run"]
        assert step["shell"] == "bash"
        assert "uses" not in step
        assert all(INPUT.fullmatch(value) for value in step["env"].values())


def test_every_input_is_described_and_used() -> None:
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    used = set(re.findall(r"inputs\.([a-z-]+)", text))
    assert used == set(ACTION["inputs"])
    assert all(each["description"] for each in ACTION["inputs"].values())
    assert {name for name, each in ACTION["inputs"].items() if each.get("required")} == {
        "base",
        "adapter",
    }


def test_every_output_comes_from_a_step() -> None:
    for name, output in ACTION["outputs"].items():
        step, key = re.fullmatch(
            r"\$\{\{ steps\.([a-z]+)\.outputs\.([a-z]+) \}\}", output["value"]
        ).groups()
        assert key == name
        (script,) = [each["run"] for each in STEPS.values() if each.get("id") == step]
        assert f"'{key}=" in script


def test_every_variable_of_a_script_is_set() -> None:
    for step in STEPS.values():
        named = set(re.findall(r"\$\{?([A-Z_]+)", step["run"]))
        assert named - {"RUNNER_TEMP", "GITHUB_OUTPUT"} == set(step["env"])


# --- what it does -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_installation(tmp_path: Path) -> None:
    """pip installs what was asked for: here a wheel that calls the boneconv under test."""
    wheel = tmp_path / "boneconv-0-py3-none-any.whl"
    info = "boneconv-0.dist-info"
    shim = f"import os, sys\ndef main():\n    os.execv({sys.executable!r}, [{sys.executable!r}, "
    files = {
        "boneconv_shim.py": f'{shim}"-c", {_MAIN!r}, *sys.argv[1:]])\n',
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: boneconv\nVersion: 0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nboneconv = boneconv_shim:main\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in files))
    runner = Runner(tmp_path, {"requirement": str(wheel), "python": sys.executable})
    code = runner.run("Install boneconv", PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    assert code == 0, runner.log
    assert "boneconv, version" in runner.log
    demo(tmp_path)
    runner.inputs |= {"base": "base", "adapter": "adapter-bone", "verify": "false"}
    runner.all()
    assert snapshot(tmp_path / "merged") == snapshot(tmp_path / "merged-bone")
    runner.inputs["requirement"] = "--version"  # no option, but a name that no package has
    assert runner.run("Install boneconv", PIP_NO_INDEX="1") != 0


def test_merge_and_verify(folder: Path) -> None:
    runner = installed(Runner(folder, {"base": "base", "adapter": "adapter-bone"}))
    runner.all()
    assert runner.outputs() == {"out": "merged", "reports": "boneconv-reports", "verified": "true"}
    assert snapshot(folder / "merged") == snapshot(folder / "merged-bone")
    reports = folder / "boneconv-reports"
    names = ["verify.html", "verify.json", "verify.md", "verify.xml"]
    assert sorted(path.name for path in reports.iterdir()) == names
    assert json.loads((reports / "verify.json").read_text())["passed"] is True
    assert JUnitXml.fromfile(str(reports / "verify.xml")).failures == 0
    assert runner.summary.read_text(encoding="utf-8").count("PASS") == 1


def test_a_stack_with_options(folder: Path) -> None:
    inputs = {
        "base": "base/model.safetensors",
        "adapter": "adapter-bone",
        "more-adapters": "adapter-bat\n\nadapter-bone\n",
        "out": "merged.safetensors",
        "scale": "0.5",
        "dtype": "float32",
        "tolerance": "canonical",
    }
    installed(runner := Runner(folder, inputs)).all()
    document = json.loads((folder / "boneconv-reports" / "verify.json").read_text())
    assert document["adapters"] == ["adapter-bone", "adapter-bat", "adapter-bone"]
    assert (document["scale"], document["dtype"]) == (0.5, "float32")
    assert runner.outputs()["out"] == "merged.safetensors"


def test_a_failed_verification_fails_the_step_and_leaves_its_reports(folder: Path) -> None:
    runner = installed(Runner(folder, {"base": "base", "adapter": "adapter-bone"}))
    assert runner.run("Merge") == 0
    weights = folder / "merged" / "model.safetensors"
    weights.write_bytes((folder / "base" / "model.safetensors").read_bytes())
    assert runner.run("Verify") == 1
    assert "the adapter was not applied" in runner.log
    assert runner.outputs() == {"out": "merged", "reports": "boneconv-reports"}
    assert json.loads((folder / "boneconv-reports" / "verify.json").read_text())["passed"] is False
    assert "FAIL" in runner.summary.read_text(encoding="utf-8")


def test_export_to_onnx(folder: Path) -> None:
    make_graph(folder / "base", folder / "base.onnx")
    inputs = {"base": "base", "adapter": "adapter-bat", "export-onnx": "onnx", "graph": "base.onnx"}
    runner = installed(Runner(folder, inputs))
    runner.all()
    assert runner.outputs()["onnx"] == "onnx"
    document = json.loads((folder / "boneconv-reports" / "onnx.json").read_text())
    assert (document["passed"], document["kind"]) == (True, "onnx")
    assert runner.summary.read_text(encoding="utf-8").count("PASS") == 2


def test_a_scale_that_the_export_would_ignore_is_refused(folder: Path) -> None:
    inputs = {"base": "base", "adapter": "adapter-bat", "export-onnx": "onnx", "scale": "0.5"}
    assert installed(runner := Runner(folder, inputs)).run("Export to ONNX") == 2
    assert "::error::" in runner.log
    assert not (folder / "onnx").exists()


def test_hostile_names_are_names(tmp_path: Path) -> None:
    place = tmp_path / HOSTILE
    place.mkdir()
    demo(place)
    inputs = {
        "base": f"{HOSTILE}/base",
        "adapter": f"{HOSTILE}/adapter-bone",
        "more-adapters": f"{HOSTILE}/adapter-bat",
        "out": f"{HOSTILE}/out",
        "reports": f"{HOSTILE}/reports",
    }
    runner = installed(Runner(tmp_path, inputs))
    runner.all()
    assert (place / "out" / "model.safetensors").exists()
    assert runner.outputs()["out"] == f"{HOSTILE}/out"
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("step", "name"), [("Merge", "out"), ("Verify", "reports"), ("Export to ONNX", "export-onnx")]
)
def test_a_line_break_cannot_forge_an_output(folder: Path, step: str, name: str) -> None:
    inputs = {"base": "base", "adapter": "adapter-bone", name: "x\nverified=true"}
    runner = installed(Runner(folder, inputs))
    assert runner.run(step) == 2
    assert not (runner.temp / "output").exists()
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("x")) == []


def test_options_cannot_be_smuggled_in_as_paths(folder: Path) -> None:
    runner = installed(Runner(folder, {"base": "--force", "adapter": "adapter-bone"}))
    assert runner.run("Merge") == 2
    assert "--force" in runner.log
    assert not (folder / "merged").exists()
