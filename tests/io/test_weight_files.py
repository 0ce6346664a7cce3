"""Files of a model's folder by their names."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from boneconv.io.weight_files import (
    files_below,
    holds_weights,
    in_weight_folder,
    index_of,
    is_weight_copy,
    single_of,
)


@pytest.mark.parametrize(
    ("name", "is_copy"),
    [
        ("model.safetensors", True),
        ("a/b/model.safetensors", True),
        ("onnx/config.json", True),
        ("a/original/tokenizer.model", True),
        ("original", False),
        ("tokenizer.model", False),
        ("config.json", False),
        ("modeling_x.py", False),
        ("model.safetensors.index.json", True),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", True),
        ("pytorch_model.bin.index.fp16.json", True),
        ("model.onnx_data", True),
    ],
)
def test_is_weight_copy(name: str, is_copy: bool) -> None:
    assert is_weight_copy(PurePosixPath(name)) is is_copy


def test_folders_of_other_forms() -> None:
    assert in_weight_folder(PurePosixPath("a/onnx/b.json"))
    assert not in_weight_folder(PurePosixPath("a/onnx"))
    assert not in_weight_folder(PurePosixPath("a/model.safetensors"))


@pytest.mark.parametrize(
    ("single", "index"),
    [
        ("model.safetensors", "model.safetensors.index.json"),
        ("model.fp16.safetensors", "model.safetensors.index.fp16.json"),
        (
            "diffusion_pytorch_model.non_ema.safetensors",
            "diffusion_pytorch_model.safetensors.index.non_ema.json",
        ),
        ("my.own.safetensors", "my.own.safetensors.index.json"),
    ],
)
def test_an_index_and_the_model_it_is_for(single: str, index: str) -> None:
    assert index_of(single) == index
    assert single_of(index) == single


def test_a_folder_with_weights(tmp_path: Path) -> None:
    assert not holds_weights(tmp_path / "none")
    assert not holds_weights(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "model.safetensors").touch()
    assert not holds_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert holds_weights(tmp_path)


def test_files_below_a_folder(tmp_path: Path) -> None:
    names = ["b.txt", "a/x.txt", "a/c/y.txt", "c/z.txt", ".git/config", ".gitattributes"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "c")
    found = [(str(path), is_link) for path, is_link in files_below(tmp_path, without=["c"])]
    assert found == [("b.txt", False), ("a/link", True), ("a/x.txt", False), ("a/c/y.txt", False)]
