"""The demo: a tiny model, both variants, every merged weight checked; and checked again here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import boneconv.demo
from boneconv.demo import demo
from boneconv.errors import InputError
from tests.builders import F32, F64, Array, snapshot, unpack


def _delta(weight: Array, block: Array) -> Array:
    """The formulas of the demo's own text, element by element."""
    w, b = weight.astype(F64), block.astype(F64)
    rows, columns = w.shape
    result = np.zeros_like(w)
    if b.ndim == 2:
        for j in range(columns):
            result[:, j] = b[j % b.shape[0]]
        return result
    r = b.shape[-1]
    for i in range(0, rows, r):
        for j in range(0, columns, r):
            result[i : i + r, j : j + r] = w[i : i + r, j : j + r] @ b[i // r] + b[i // r]
    return result


def test_every_weight_is_right_and_the_check_is_honest(tmp_path: Path) -> None:
    rows = demo(tmp_path)
    assert [(row.variant, row.wrong) for row in rows] == [("bone", 0)] * 3 + [("bat", 0)] * 3
    base = unpack(tmp_path / "base" / "model.safetensors")
    for row in rows:
        blocks = unpack(tmp_path / f"adapter-{row.variant}" / "adapter_model.safetensors")
        merged = unpack(tmp_path / f"merged-{row.variant}" / "model.safetensors")[row.tensor]
        weight = base[row.tensor]
        block = blocks[f"base_model.model.{row.tensor.removesuffix('.weight')}.bone_block"]
        expected = weight.astype(F64) + _delta(weight, block)
        # bfloat16 keeps 8 bits: half a unit in the last place is 2**-9 of a value's power of two
        assert np.all(np.abs(merged.astype(F64) - expected) <= np.abs(expected) * 2.0**-8)
        assert row.weight_shape == weight.shape
        assert row.block_shape == block.shape
        assert (row.before, row.after) == (float(weight[0, 0]), float(merged[0, 0]))
        assert row.changed == int((weight.astype(F32) != merged.astype(F32)).sum()) > 0
        assert row.elements == weight.size


def test_a_wrong_weight_would_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = boneconv.demo.merge

    def merge_badly(base: Path, adapter: Path, out: Path) -> None:
        real(base, adapter, out)
        path = out / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(boneconv.demo, "merge", merge_badly)
    assert sum(row.wrong for row in demo(tmp_path)) == 2


def test_it_is_the_same_every_time(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    rows = []
    for folder in folders:
        folder.mkdir()
        rows.append(demo(folder))
    assert rows[0] == rows[1]
    assert snapshot(folders[0]) == snapshot(folders[1])
    assert {name.split("/")[0] for name in snapshot(folders[0])} == {
        "base",
        "adapter-bone",
        "adapter-bat",
        "merged-bone",
        "merged-bat",
    }


def test_an_earlier_demo_is_not_overwritten(tmp_path: Path) -> None:
    demo(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(InputError):
        demo(tmp_path)
    assert snapshot(tmp_path) == before
