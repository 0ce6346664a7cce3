"""LoRA from an adapter: exact, or to the error that the record names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import boneconv
from boneconv.errors import (
    CheckFailedError,
)
from boneconv.formats import read_adapter
from tests.builders import (
    BF16,
    F16,
    F32,
    F64,
    HIDDEN,
    Q,
    blocks_for_all,
    grid,
    make_adapter,
    make_base,
    merged,
    module,
    same_bits,
    snapshot,
    unpack,
)
from tests.conversion.folders import FOLDER, NORM, TENSORS, config_of, record_of


def _check_lora(adapter: Path, base: Path, out: Path, *, error: float = 0.0) -> None:
    """Every factor pair gives the update of the merge, to the error that the record names."""
    config, record = config_of(out), record_of(out)
    tensors, weights = unpack(out / TENSORS), unpack(base / "model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    for name, block in read_adapter(adapter).blocks.items():
        weight = weights[f"{name}.weight"].astype(F64)
        lora_a = tensors.pop(f"base_model.model.{name}.lora_A.weight")
        lora_b = tensors.pop(f"base_model.model.{name}.lora_B.weight")
        assert lora_a.shape[0] == lora_b.shape[1] == config["r"]
        assert lora_a.dtype == lora_b.dtype == block.tensor.read().dtype
        change = merged(weight, block.tensor.read(), str(block.variant)) - weight
        left = change - scale * lora_b.astype(F64) @ lora_a.astype(F64)
        found = np.linalg.norm(left) / np.linalg.norm(change)
        assert found == pytest.approx(record["modules"][name]["error"], rel=1e-3, abs=1e-12)
        assert found <= error
    saved = {f"base_model.model.{name}" for name in read_adapter(adapter).saved}
    assert set(tensors) == saved


@pytest.mark.parametrize("variant", ["bone", "mini"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("rank", [4, 5, 25])
def test_bone_and_mini_become_an_exact_lora(
    tmp_path: Path, variant: str, dtype: Any, rank: int
) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(
        tmp_path / "a",
        variant,
        rank=rank,
        blocks=blocks_for_all(variant, rank=rank, dtype=dtype),
        saved={NORM: grid((HIDDEN,), dtype)},
    )
    result = boneconv.convert(adapter, tmp_path / "lora", to="peft-lora", base=base)
    assert (result.rank, result.worst_error) == (rank, 0.0)
    assert set(snapshot(tmp_path / "lora")) == FOLDER
    config = config_of(tmp_path / "lora")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", rank, rank)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    _check_lora(adapter, base, tmp_path / "lora")


@pytest.mark.parametrize(("rank", "padded"), [(3, 8), (8, 8), (9, 16), (300, 320), (513, 513)])
def test_a_rank_is_padded_to_one_that_vllm_serves(tmp_path: Path, rank: int, padded: int) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", rank=rank, blocks=blocks_for_all(rank=rank))
    result = boneconv.convert(adapter, tmp_path / "l", to="peft-lora", base=base, pad_rank=True)
    assert result.rank == config_of(tmp_path / "l")["r"] == config_of(tmp_path / "l")["lora_alpha"]
    assert result.rank == padded
    assert any("above 512" in note for note in result.notes) == (rank > 512)
    _check_lora(adapter, base, tmp_path / "l")


def test_bat_becomes_a_lora_of_a_rank(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a", "bat")
    options: dict[str, Any] = {"to": "peft-lora", "base": base, "max_error": 1.0}
    errors = []
    for rank in (1, 4, 8, 12):
        out = tmp_path / f"rank{rank}"
        result = boneconv.convert(adapter, out, rank=rank, **options)
        assert result.rank == rank == config_of(out)["r"]
        assert record_of(out)["worst_error"] == pytest.approx(result.worst_error, rel=1e-3)
        _check_lora(adapter, base, out, error=1.0)
        errors.append(result.worst_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6  # no side of these weights is wider than 12


def test_bat_becomes_a_lora_of_an_energy(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a", "bat")
    result = boneconv.convert(
        adapter, tmp_path / "l", to="peft-lora", base=base, energy=0.95, max_error=1.0
    )
    _check_lora(adapter, base, tmp_path / "l", error=np.sqrt(0.05) + 1e-6)
    assert 1 < result.rank < 12
    less = tmp_path / "less"
    boneconv.convert(adapter, less, to="peft-lora", base=base, rank=result.rank - 1, max_error=1.0)
    assert record_of(less)["worst_error"] > np.sqrt(0.05)


def test_padding_bats_rank_lowers_its_error(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a", "bat")
    options: dict[str, Any] = {"to": "peft-lora", "base": base, "max_error": 1.0, "rank": 5}
    plain = boneconv.convert(adapter, tmp_path / "plain", **options)
    padded = boneconv.convert(adapter, tmp_path / "padded", pad_rank=True, **options)
    assert (plain.rank, padded.rank) == (5, 8)
    assert padded.worst_error < plain.worst_error
    _check_lora(adapter, base, tmp_path / "padded", error=1.0)


def test_an_error_above_the_limit_is_a_failed_check(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a", "bat")
    options: dict[str, Any] = {"to": "peft-lora", "base": base, "rank": 2}
    with pytest.raises(
        CheckFailedError, match=r"6 of 6 modules .*self_attn\.q_proj 0\.\d+"
    ) as info:
        boneconv.convert(adapter, tmp_path / "l", **options)
    assert info.value.exit_code == 1
    assert not list(tmp_path.glob("l*"))
    result = boneconv.convert(adapter, tmp_path / "l", allow_error=True, **options)
    assert result.worst_error > 0.05
    assert any("was allowed" in note for note in result.notes)


def test_a_lora_larger_than_the_merge_is_said_to_be(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a", "bat")
    result = boneconv.convert(adapter, tmp_path / "l", to="peft-lora", base=base, rank=12)
    assert any("is larger than the merged weights" in note for note in result.notes)


def test_bat_uses_the_weight_that_came_with_its_block(tmp_path: Path) -> None:
    own = {f"{module(0, Q)}.weight": grid((HIDDEN, HIDDEN), F32, 99)}
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", "bat", saved=own)
    boneconv.convert(adapter, tmp_path / "l", to="peft-lora", base=base, rank=12)
    found = unpack(tmp_path / "l" / TENSORS)
    prefix = f"base_model.model.{module(0, Q)}"
    block = read_adapter(adapter).blocks[module(0, Q)].tensor.read()
    weight = own[f"{module(0, Q)}.weight"].astype(F64)
    product = found[f"{prefix}.lora_B.weight"].astype(F64) @ found[f"{prefix}.lora_A.weight"]
    assert product == pytest.approx(merged(weight, block, "bat") - weight, abs=1e-4)
    assert same_bits(found[f"{prefix}.base_layer.weight"], own[f"{module(0, Q)}.weight"])


def test_a_native_adapter_with_a_fingerprint_needs_no_base(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a")
    boneconv.convert(adapter, tmp_path / "native", to="native", base=base)
    boneconv.convert(tmp_path / "native", tmp_path / "l", to="peft-lora")
    _check_lora(adapter, base, tmp_path / "l")
