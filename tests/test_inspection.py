"""What an adapter or a checkpoint holds, from headers alone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from boneconv.errors import FormatError, MissingPathError, NotABoneAdapterError
from boneconv.inspection import AdapterSummary, BlockSummary, CheckpointSummary, inspect
from tests.builders import (
    BF16,
    HIDDEN,
    INNER,
    LAYERS,
    RANK,
    UP,
    base_tensors,
    blocks_for_all,
    entry,
    grid,
    make_adapter,
    make_base,
    module,
    raw_file,
)


def test_an_adapter(tmp_path: Path) -> None:
    blocks = blocks_for_all("bat", dtype=BF16)
    saved = {"score.weight": grid((3, HIDDEN))}
    folder = make_adapter(
        tmp_path / "a",
        "bat",
        blocks=blocks,
        saved=saved,
        base_model_name_or_path="owner/base",
        lora_alpha=1,
    )
    found = inspect(folder)
    assert isinstance(found, AdapterSummary)
    assert (found.path, found.format, found.variant, found.rank) == (folder, "peft", "bat", RANK)
    assert found.base == "owner/base"
    assert found.dtypes == ("BF16", "F32")
    assert found.parameters == sum(b.size for b in blocks.values()) + 3 * HIDDEN
    assert len(found.blocks) == 3 * LAYERS
    up = BlockSummary(module(0, UP), (INNER // RANK, RANK, RANK), "BF16", INNER * RANK, RANK)
    assert up in found.blocks
    assert found.saved == ("score.weight",)
    assert found.unknown_fields == ("lora_alpha",)
    assert inspect(folder / "adapter_model.safetensors").blocks == found.blocks  # type: ignore[union-attr]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint(tmp_path: Path, shards: int) -> None:
    files = {"tokenizer.json": "{}", "pytorch_model.bin": "stale"}
    base = make_base(tmp_path / "base", shards=shards, files=files)
    found = inspect(base)
    assert isinstance(found, CheckpointSummary)
    tensors = base_tensors()
    assert found.tensors == len(tensors)
    assert found.parameters == sum(int(np.prod(t.shape)) for t in tensors.values())
    assert found.dtypes == {"BF16": len(tensors) - 1, "I64": 1}
    assert [s.name for s in found.shards] == sorted(p.name for p in base.glob("*.safetensors"))
    assert sum(shard.tensors for shard in found.shards) == len(tensors)
    assert found.nbytes == sum(p.stat().st_size for p in base.glob("*.safetensors"))
    assert (found.side_files, found.left_out) == (("tokenizer.json",), ("pytorch_model.bin",))


def test_a_single_file(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    found = inspect(base / "model.safetensors")
    assert isinstance(found, CheckpointSummary)
    assert found.tensors == len(base_tensors())
    assert found.side_files == ()


def test_any_size_is_instant(tmp_path: Path) -> None:
    """Eight gigabytes that the file system does not store."""
    size = 2**33
    content = raw_file({"t": entry("BF16", [2**16, 2**16], 0, size)})
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    os.truncate(path, len(content) + size)
    start = time.perf_counter()
    found = inspect(tmp_path)
    assert time.perf_counter() - start < 1
    assert found.parameters == 2**32


def test_what_is_neither(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError):
        inspect(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="holds no safetensors weights"):
        inspect(tmp_path)
    (tmp_path / "x.txt").write_text("some text, longer than eight bytes")
    with pytest.raises(FormatError, match="not a safetensors file"):
        inspect(tmp_path / "x.txt")
    with pytest.raises(NotABoneAdapterError):
        inspect(make_adapter(tmp_path / "a", peft_type="LORA"))


def test_a_pth_file_is_an_adapter_or_a_checkpoint(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    adapter, base = tmp_path / "adapter.pth", tmp_path / "base.pth"
    torch.save({"blocks.0.att.key.bone": torch.zeros(4, 12)}, adapter)
    torch.save({"blocks.0.att.key.weight": torch.zeros(12, 8)}, base)
    summary, checkpoint = inspect(adapter), inspect(base)
    assert isinstance(summary, AdapterSummary)
    assert (summary.format, summary.variant, summary.rank) == ("rwkv", "bone", 4)
    assert isinstance(checkpoint, CheckpointSummary)
    assert (checkpoint.tensors, checkpoint.parameters) == (1, 96)
