"""boneconv.json: what was merged, and nothing that differs between machines or runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import blake3
import pytest

from boneconv import __version__
from boneconv.merging import merge
from tests.builders import (
    EMBEDDING,
    F32,
    HIDDEN,
    Q,
    grid,
    make_adapter,
    make_base,
    module,
    snapshot,
    tree_digest,
    unpack_folder,
)


def _record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "boneconv.json").read_text())
    return record


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    base = make_base(tmp_path / "base", shards=2)
    saved = {EMBEDDING: grid((32, HIDDEN), F32, 3)}
    return base, make_adapter(tmp_path / "adapter", "bat", saved=saved, strange=1)


def test_it_names_every_tensor_its_action_and_its_digests(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    out = merge(base, adapter, tmp_path / "out").out
    tensors = _record(out)["tensors"]
    before, after = unpack_folder(base), unpack_folder(out)
    assert set(tensors) == set(after)
    for name, entry in tensors.items():
        dtype = "I64" if name == "model.position_ids" else "BF16"
        assert entry["digest"] == tree_digest(dtype, after[name]), name
        if entry["action"] == "merge":
            assert entry["base_digest"] == tree_digest(dtype, before[name])
        else:
            assert set(entry) == {"action", "digest"}
    assert tensors[EMBEDDING]["action"] == "replace"
    assert tensors[f"{module(0, Q)}.weight"]["action"] == "merge"
    assert tensors["model.position_ids"]["action"] == "copy"


def test_it_says_what_was_merged_and_how(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    out = merge(base, adapter, tmp_path / "out", dtype="float32", max_shard_size="1MB").out
    record = _record(out)
    assert record["boneconv"] == __version__
    assert record["numerics"] == "canonical"
    assert record["base"] == {}
    (entry,) = record["adapters"]
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    assert entry["blake3"] == blake3.blake3(weights).hexdigest()
    assert (entry["format"], entry["variant"], entry["axis"]) == ("peft", "bat", "out")
    assert (entry["rank"], entry["scale"]) == (4, 1.0)
    assert entry["unknown_fields"] == ["strange"]
    assert entry["trained_on"] is None
    assert record["options"]["max_shard_size"] == 1_000_000


def test_a_local_path_of_the_base_is_not_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base_model_name_or_path=str(base))
    out = merge(base, adapter, tmp_path / "out").out
    for name, content in snapshot(out).items():
        assert str(tmp_path).encode() not in content, name


def test_a_name_on_the_hub_is(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base_model_name_or_path="owner/base")
    out = merge(base, adapter, tmp_path / "out").out
    assert _record(out)["adapters"][0]["trained_on"] == "owner/base"
    assert "base_model: owner/base" in (out / "README.md").read_text()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_outputs_compare_equal(inputs: tuple[Path, Path], tmp_path: Path, workers: int) -> None:
    base, adapter = inputs
    first = merge(base, adapter, tmp_path / "out", workers=1).out
    elsewhere = tmp_path / "some" / "where else"
    shutil.copytree(base, elsewhere / "b")
    shutil.copytree(adapter, elsewhere / "a")
    for path in (elsewhere / "b").iterdir():
        os.utime(path, (0, 0))
    second = merge(elsewhere / "b", elsewhere / "a", elsewhere / "o", workers=workers).out
    assert snapshot(first) == snapshot(second)


def test_a_record_beside_a_file_is_the_same(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base = make_base(tmp_path / "single")
    out = merge(base, inputs[1], tmp_path / "out").out
    result = merge(base / "model.safetensors", inputs[1], tmp_path / "out.safetensors")
    assert json.loads(result.record.read_text()) == _record(out)
