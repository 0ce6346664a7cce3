"""A diffusers pipeline on disk: which components it has, and whose the other files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from boneconv.errors import FormatError, MissingPathError, NameMatchError
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.model_index import read_components
from boneconv.io.pipeline import Pipeline, open_pipeline
from tests.builders import base_tensors, make_base


def _pipeline(folder: Path, index: Any, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_name_or_path": ["a", "b", "c"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "../outside": ["diffusers", "UNet2DConditionModel"],
    "requires_safety_checker": False,
    "text_encoder": ["transformers", "CLIPTextModel"],
}


def test_a_component_has_a_class(tmp_path: Path) -> None:
    assert read_components(tmp_path) is None
    _pipeline(tmp_path, INDEX)
    assert read_components(tmp_path) == ("scheduler", "text_encoder", "unet")


def test_components_are_checkpoints(tmp_path: Path) -> None:
    root = _pipeline(tmp_path / "p", INDEX, "scheduler/config.json", "text_encoder/model.bin")
    make_base(root / "unet", shards=2)
    pipeline = open_pipeline(root)
    assert pipeline == Pipeline(root, ("scheduler", "text_encoder", "unet"))
    assert pipeline.with_weights == ("text_encoder", "unet")
    assert set(pipeline.open("unet").tensors) == set(base_tensors())
    with pytest.raises(NameMatchError, match="no component 'vae'; expected text_encoder, unet"):
        pipeline.open("vae")
    with pytest.raises(NameMatchError, match="'scheduler' holds no weights; expected text_enc"):
        pipeline.open("scheduler")
    with pytest.raises(FormatError, match="holds no safetensors weights"):
        pipeline.open("text_encoder")


def test_a_pipeline_without_weights(tmp_path: Path) -> None:
    pipeline = open_pipeline(_pipeline(tmp_path, INDEX))
    with pytest.raises(NameMatchError, match="expected no component with weights"):
        pipeline.open("unet")


def test_whose_the_other_files_are(tmp_path: Path) -> None:
    root = _pipeline(
        tmp_path,
        INDEX,
        "unet/model.safetensors",
        "unet/config.json",
        "text_encoder/pytorch_model.bin",
        "text_encoder/onnx/model.onnx",
        "scheduler/config.json",
        "whole.ckpt",
        "adapter_config.json",
        "onnx/readme.txt",
        "assets/picture.png",
        "assets/vae.pt",
    )
    files, left_out = open_pipeline(root).other_files(["unet"])
    assert sorted(map(str, files)) == [
        "assets/picture.png",
        "assets/vae.pt",
        "model_index.json",
        "scheduler/config.json",
        "text_encoder/onnx/model.onnx",
        "text_encoder/pytorch_model.bin",
    ]
    assert sorted(map(str, left_out)) == ["adapter_config.json", "onnx/readme.txt", "whole.ckpt"]


def test_what_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError):
        open_pipeline(tmp_path / "gone")
    with pytest.raises(FormatError, match="not a diffusers pipeline"):
        open_pipeline(make_base(tmp_path / "base"))
    (tmp_path / "base" / "model_index.json").write_text("{")
    with pytest.raises(FormatError, match="not a JSON file"):
        open_pipeline(tmp_path / "base")


def test_a_pipeline_is_no_checkpoint(tmp_path: Path) -> None:
    root = _pipeline(make_base(tmp_path / "p"), INDEX)
    with pytest.raises(FormatError, match="expected a component: scheduler, text_encoder, unet"):
        open_checkpoint(root)
    make_base(root / "unet")
    with pytest.raises(FormatError, match=r"expected a component: unet\. To merge into a comp"):
        open_checkpoint(root)
    assert open_checkpoint(root / "model.safetensors").single_file
