"""A small pipeline of components, and adapters for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.builders import (
    F16,
    F32,
    HIDDEN,
    Q,
    base_tensors,
    grid,
    make_adapter,
    make_base,
    module,
    pack,
)

UNET_FILE = "diffusion_pytorch_model.safetensors"
Q0 = f"{module(0, Q)}.weight"


def write_files(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)


def unet_tensors() -> dict[str, Any]:
    return {
        "mid.proj_in.weight": grid((HIDDEN, 8, 1, 1), F16, 1),
        "mid.proj_in.bias": grid((HIDDEN,), F16, 2),
        "conv_in.weight": grid((8, 4, 3, 3), F16, 3),
    }


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A UNet with a convolution and two text encoders whose tensors have the same names."""
    root = tmp_path / "pipeline"
    make_base(root / "text_encoder", shards=2, files={"notes.txt": "one"})
    make_base(root / "text_encoder_2", base_tensors(F32, seed=5), files={"notes.txt": "two"})
    index = {
        "_class_name": "SomePipeline",
        "_diffusers_version": "0.42.1",
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_files(
        root,
        {
            "model_index.json": json.dumps(index),
            "README.md": "---\nlicense: mit\n---\nThe pipeline's own card.\n",
            "scheduler/scheduler_config.json": '{"steps": 3}',
            "tokenizer/vocab.json": "{}",
            "tokenizer/tokenizer.model": b"\x00\xff",
            "unet/config.json": '{"_class_name": "UNet", "_diffusers_version": "0.42.1"}',
            f"unet/{UNET_FILE}": pack(unet_tensors(), {"format": "pt"}),
            "vae/config.json": "{}",
            f"vae/{UNET_FILE}": b"weights that nobody here can read",
            "vae/diffusion_pytorch_model.fp16.safetensors": b"in half precision",
        },
    )
    return root


@pytest.fixture
def unet_adapter(tmp_path: Path) -> Path:
    blocks = {"mid.proj_in": grid((4, HIDDEN), F32, 7)}
    return make_adapter(tmp_path / "for-unet", blocks=blocks)


@pytest.fixture
def text_adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "for-text", "bat")
