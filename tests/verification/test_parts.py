"""Pipelines: the merged components as checkpoints, all other files byte by byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import boneconv
from boneconv.verification import verify
from boneconv.verification.report import Status
from tests.verification.models import Case, make_case

FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Two text encoders of which the first has an adapter, and a scheduler."""
    made = make_case(tmp_path, files={"notes.txt": "one"})
    root = tmp_path / "pipeline"
    root.mkdir()
    shutil.copytree(made.base, root / "text_encoder")
    shutil.copytree(made.base, root / "text_encoder_2")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text('{"steps": 3}')
    index = {
        "_class_name": "SomePipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModel"],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    made.base = root
    return made


@pytest.fixture
def merged(case: Case, tmp_path: Path) -> Path:
    boneconv.merge(case.base, case.adapter, tmp_path / "out", component="text_encoder")
    return tmp_path / "out"


def test_a_merged_pipeline_passes(case: Case, merged: Path) -> None:
    report = verify(case.base, case.adapter, merged, component="text_encoder", workers=1)
    assert report.passed
    assert report.numerics == "canonical"
    assert {tensor.name.split("/")[0] for tensor in report.tensors} == {"text_encoder"}
    files = {file.name for file in report.files}
    assert {"scheduler/scheduler_config.json", f"text_encoder_2/{FIRST}"} <= files


def test_a_component_that_was_not_merged(case: Case, merged: Path) -> None:
    shutil.copyfile(case.base / "text_encoder" / FIRST, merged / "text_encoder" / FIRST)
    report = verify(case.base, case.adapter, merged, component="text_encoder", workers=1)
    codes = {finding.code for finding in report.findings}
    assert codes == {"stale-shard", "not-applied"}
    assert all(f.message.startswith("text_encoder: ") for f in report.findings)


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", f"text_encoder_2/{FIRST}"])
def test_another_file_that_changed(name: str, case: Case, merged: Path) -> None:
    content = (merged / name).read_bytes()
    (merged / name).write_bytes(content[:-1] + b"x")
    report = verify(case.base, case.adapter, merged, component="text_encoder", workers=1)
    assert [file.name for file in report.files if file.status is Status.FAIL] == [name]
