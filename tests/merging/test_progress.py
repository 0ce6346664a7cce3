"""Progress ends where it was said to: tensors, copied files and the delta file are all counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from boneconv.merging import merge
from boneconv.unmerging import unmerge
from tests.builders import make_adapter, make_base
from tests.merging.components import pipeline, unet_adapter
from tests.progress import Told

__all__ = ["pipeline", "unet_adapter"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", shards=2, files={"tokenizer.json": "{}" * 5000})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", "bat")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_and_back(base: Path, adapter: Path, tmp_path: Path, workers: int) -> None:
    told = Told()
    merge(base, adapter, tmp_path / "out", workers=workers, progress=told)
    assert told.total == sum(told.done) > 10_000
    back = Told()
    unmerge(tmp_path / "out", adapter, tmp_path / "back", workers=workers, progress=back)
    assert back.total == sum(back.done) > 10_000


def test_several_outputs(base: Path, adapter: Path, tmp_path: Path) -> None:
    one, two = Told(), Told()
    merge(base, adapter, tmp_path / "one", progress=one)
    each = [(adapter, tmp_path / "three")]
    merge(base, adapter, tmp_path / "two", each=each, progress=two)
    assert two.total == sum(two.done) == 2 * one.total


def test_a_delta_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    told = Told()
    merge(base, adapter, tmp_path / "out", keep_delta=tmp_path / "delta", progress=told)
    assert told.total == sum(told.done)


def test_one_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    told = Told()
    source = make_base(tmp_path / "whole") / "model.safetensors"
    merge(source, adapter, tmp_path / "out.safetensors", progress=told)
    assert told.total == sum(told.done) > 0


def test_a_pipeline(pipeline: Path, unet_adapter: Path, tmp_path: Path) -> None:
    told = Told()
    merge(pipeline, unet_adapter, tmp_path / "out", component="unet", progress=told)
    assert told.total == sum(told.done) > 0
