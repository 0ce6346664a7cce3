"""RWKV-PEFT's ``.pth`` adapters, merged into ``.pth`` bases: its formula, rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import boneconv
from boneconv.config import Axis, Variant
from boneconv.errors import FormatError, NotABoneAdapterError, ShapeError, UsageError
from boneconv.formats import detect, read_adapter, rwkv
from tests.builders import BF16, F16, F32, F64, Array, grid, same_bits, unpack

RANK = 4
SHAPES = {
    "blocks.0.att.receptance": (12, 12),
    "blocks.0.ffn.key": (20, 12),
    "blocks.0.ffn.value": (12, 20),
}
TIME = "blocks.0.att.time_decay"
TORCH = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32}


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.astype(F64)).to(TORCH[array.dtype])


def _array(tensor: torch.Tensor) -> Array:
    """The bits of a torch tensor."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BF16)
    return tensor.numpy()


def _weights(dtype: Any = BF16) -> dict[str, Array]:
    weights = {f"{name}.weight": grid(shape, dtype) for name, shape in SHAPES.items()}
    return weights | {TIME: grid((1, 1, 12), dtype), "emb.weight": grid((8, 12), dtype)}


def _block(kind: str, shape: tuple[int, int], dtype: Any = BF16) -> Array:
    out, inside = shape
    return grid((RANK, out) if kind == "bone" else (inside // RANK, RANK, RANK), dtype, 7)


def _blocks(kind: str, dtype: Any = BF16) -> dict[str, Array]:
    return {name: _block(kind, shape, dtype) for name, shape in SHAPES.items()}


def _save(path: Path, arrays: dict[str, Array]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: _tensor(array) for name, array in arrays.items()}, path)
    return path


def _adapter(
    path: Path, kind: str, key: str, dtype: Any = BF16, saved: dict[str, Array] | None = None
) -> Path:
    blocks = {f"{name}.{key}": block for name, block in _blocks(kind, dtype).items()}
    return _save(path, blocks | (saved or {}))


def published(weight: Array, block: Array) -> Array:
    """What RWKV-PEFT's merge script computes, in float64 and rounded once."""
    w, b = (torch.from_numpy(a.astype(F64)) for a in (weight, block))
    out, inside = w.shape
    if b.dim() == 3:
        r = b.shape[-1]
        tiles = w.reshape(out // r, r, inside // r, r).permute(0, 2, 1, 3)
        change = (tiles @ b + b).permute(0, 2, 1, 3).reshape(out, inside)
    else:
        r = b.shape[0]
        padded = torch.nn.functional.pad(w, (0, -inside % r)).reshape(out, -1, r)
        change = (padded + b.T[:, None, :]).reshape(out, -1)[:, :inside] - w
    merged: Array = (w + change).numpy().astype(weight.dtype)
    return merged + merged.dtype.type(0)


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["bone", "disha"])
@pytest.mark.parametrize("kind", ["bone", "bat"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_variant_rank_and_axis_follow_from_the_shapes(
    tmp_path: Path, key: str, kind: str, dtype: Any
) -> None:
    path = _adapter(tmp_path / "rwkv-0.pth", kind, key, dtype, {TIME: grid((1, 1, 12), dtype, 3)})
    adapter = read_adapter(path)
    assert detect(path) == adapter.format == "rwkv"
    assert (adapter.config.variant, adapter.config.r) == (Variant(kind), RANK)
    assert set(adapter.blocks) == set(SHAPES)
    for name, block in adapter.blocks.items():
        assert same_bits(block.tensor.read(), _blocks(kind, dtype)[name])
        assert block.variant is Variant(kind)
        assert block.rank == RANK
        assert kind == "bone" or block.axis is Axis.IN
    assert same_bits(adapter.saved[TIME].read(), grid((1, 1, 12), dtype, 3))


def test_a_folder_with_one_file_is_the_adapter(tmp_path: Path) -> None:
    _adapter(tmp_path / "one" / "rwkv-0.pth", "bone", "bone")
    assert read_adapter(tmp_path / "one").config.variant is Variant.BONE
    _adapter(tmp_path / "one" / "rwkv-1.pth", "bone", "bone")
    with pytest.raises(FormatError, match=r"several \.pth files: rwkv-0\.pth, rwkv-1\.pth"):
        read_adapter(tmp_path / "one")


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"a.weight": (4, 4)}, NotABoneAdapterError, "tensors named <module>.bone"),
        ({"a.lora_A": (4, 4), "a.lora_B": (4, 4)}, NotABoneAdapterError, "a.lora_A, a.lora_B"),
        ({"a.bone": (4, 8), "b.bone": (2, 4, 4)}, FormatError, "not all Bone or all BAT"),
        ({"a.bone": (4, 8), "b.bone": (2, 8)}, FormatError, "do not have one rank"),
        ({"a.bone": (2, 4, 4), "b.bone": (2, 2, 2)}, FormatError, "do not have one rank"),
        ({"a.bone": (2, 4, 3)}, ShapeError, "no bat block of rank 3"),
        ({"a.bone": (12, 4), "b.bone": (12, 4)}, FormatError, "before September 2024"),
        ({"a.bone": (12, 4), "b.bone": (20, 4)}, FormatError, "before September 2024"),
        ({"a.bone": (4, 8), "a.disha": (4, 8)}, FormatError, "two tensors for 'a'"),
        ({"a.bone": (3,)}, FormatError, "not all Bone or all BAT"),
        ({"a.bone": (0, 8)}, FormatError, "are empty"),
    ],
)
def test_what_is_no_adapter_is_refused(
    tmp_path: Path, tensors: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = _save(tmp_path / "a.pth", {name: grid(shape, BF16) for name, shape in tensors.items()})
    with pytest.raises(error, match=message):
        read_adapter(path)


# --- merging ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("key", ["bone", "disha"])
@pytest.mark.parametrize("kind", ["bone", "bat"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_a_merge_is_the_published_formula_rounded_once(
    tmp_path: Path, kind: str, key: str, dtype: Any, suffix: str
) -> None:
    weights, blocks = _weights(dtype), _blocks(kind, dtype)
    base = _save(tmp_path / "base.pth", weights)
    saved = {TIME: grid((1, 1, 12), dtype, 3)}
    adapter = _adapter(tmp_path / "adapter.pth", kind, key, dtype, saved)
    out = tmp_path / f"out{suffix}"
    result = boneconv.merge(base, adapter, out)
    assert result.counts["merge"] == len(SHAPES)
    assert result.counts["replace"] == result.counts["copy"] == 1
    if suffix == ".pth":
        found = {k: _array(v) for k, v in torch.load(out, weights_only=True).items()}
    else:
        found = unpack(out)
    assert list(found) == list(weights)
    for name, weight in weights.items():
        block = blocks.get(name.removesuffix(".weight"))
        expected = saved.get(name, weight) if block is None else published(weight, block)
        assert same_bits(found[name], expected), name
    assert {p.name for p in tmp_path.iterdir()} == {
        "base.pth",
        "adapter.pth",
        out.name,
        f"{out.name}.boneconv.json",
    }


def test_a_ragged_rank_merges(tmp_path: Path) -> None:
    weight, block = grid((6, 10), BF16), grid((4, 6), BF16, 7)
    base = _save(tmp_path / "base.pth", {"a.weight": weight})
    adapter = _save(tmp_path / "adapter.pth", {"a.bone": block})
    boneconv.merge(base, adapter, tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)["a.weight"]
    assert same_bits(_array(found), published(weight, block))


def test_the_axes_of_a_square_weight_differ(tmp_path: Path) -> None:
    """The shapes are equal: only the format tells which axis BAT's blocks run along."""
    weight, block = grid((12, 12), F32), grid((3, 4, 4), F32, 7)
    base = _save(tmp_path / "base.pth", {"a.weight": weight})
    boneconv.merge(base, _save(tmp_path / "a.pth", {"a.bone": block}), tmp_path / "out.pth")
    found = _array(torch.load(tmp_path / "out.pth", weights_only=True)["a.weight"])
    tiles = weight.astype(F64).reshape(3, 4, 3, 4).transpose(0, 2, 1, 3)
    along_out = (tiles @ block[:, None] + block[:, None]).transpose(0, 2, 1, 3).reshape(12, 12)
    assert same_bits(found, published(weight, block))
    assert not np.array_equal(found, weight + along_out)


def test_a_safetensors_base_merges_into_a_pth_file_and_back_again(tmp_path: Path) -> None:
    weights = _weights()
    base = _save(tmp_path / "base.pth", weights)
    adapter = _adapter(tmp_path / "adapter.pth", "bat", "disha")
    boneconv.merge(base, adapter, tmp_path / "one.safetensors")
    boneconv.merge(base, adapter, tmp_path / "two.pth", workers=2)
    boneconv.merge(tmp_path / "two.pth", adapter, tmp_path / "three.pth")
    boneconv.merge(tmp_path / "one.safetensors", adapter, tmp_path / "four.pth")
    assert (tmp_path / "three.pth").read_bytes() == (tmp_path / "four.pth").read_bytes()


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    base = _save(tmp_path / "base.pth", {"blocks.0.att.receptance.weight": grid((12, 16), BF16)})
    adapter = _save(tmp_path / "a.pth", {"blocks.0.att.receptance.bone": grid((3, 4, 4), BF16)})
    with pytest.raises(ShapeError):
        boneconv.merge(base, adapter, tmp_path / "out.pth")
    assert not list(tmp_path.glob("out*"))


# --- writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["bone", "disha"])
@pytest.mark.parametrize("kind", ["bone", "bat"])
def test_what_was_read_is_written_again(tmp_path: Path, kind: str, key: str) -> None:
    saved = {TIME: grid((1, 1, 12), BF16, 3)}
    path = _adapter(tmp_path / "a.pth", kind, key, saved=saved)
    rwkv.write(rwkv.read(path), tmp_path / "b.pth")
    one, other = (torch.load(p, weights_only=True) for p in (path, tmp_path / "b.pth"))
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert same_bits(_array(tensor), _array(other[name]))


def test_bat_over_the_output_axis_cannot_be_written(tmp_path: Path) -> None:
    from tests.builders import make_adapter

    adapter = read_adapter(make_adapter(tmp_path / "peft", "bat"))
    with pytest.raises(UsageError, match="this adapter is over the output axis"):
        rwkv.write(adapter, tmp_path / "a.pth")
    mini = read_adapter(make_adapter(tmp_path / "mini", "mini"))
    with pytest.raises(UsageError, match="MiSS alone"):
        rwkv.write(mini, tmp_path / "a.pth")
