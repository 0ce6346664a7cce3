"""`boneconv.convert`: what goes in, what comes out, and where exactness ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import boneconv
from boneconv.config import Axis
from boneconv.errors import (
    BaseMismatchError,
    InputError,
    UsageError,
)
from boneconv.formats import read_adapter
from tests.builders import (
    BF16,
    F16,
    F32,
    HIDDEN,
    Q,
    base_tensors,
    blocks_for_all,
    grid,
    make_adapter,
    make_base,
    module,
    same_bits,
    snapshot,
    unpack,
)
from tests.conversion.folders import FOLDER, NORM, TENSORS, assert_same, config_of, record_of

# --- BONE and MISS ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["bone", "bat"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_bone_becomes_miss_and_bone_again(tmp_path: Path, variant: str, dtype: Any) -> None:
    adapter = make_adapter(
        tmp_path / "bone",
        variant,
        blocks=blocks_for_all(variant, dtype=dtype),
        saved={NORM: grid((HIDDEN,), dtype)},
        modules_to_save=["norm"],
        bias="bone_only",
        task_type="CAUSAL_LM",
        revision="main",
        layers_to_transform=[0, 1],
        a_field_of_the_future={"kept": [1, 2.5, None]},
    )
    boneconv.convert(adapter, tmp_path / "miss", to="peft-miss")
    boneconv.convert(tmp_path / "miss", tmp_path / "again", to="peft-bone")
    assert set(snapshot(tmp_path / "miss")) == set(snapshot(tmp_path / "again")) == FOLDER
    assert {name.rsplit(".", 1)[-1] for name in unpack(tmp_path / "miss" / TENSORS)} == {
        "miss_block",
        "weight",
    }
    assert_same(adapter, tmp_path / "miss")
    assert_same(adapter, tmp_path / "again")
    miss, again, old = (config_of(tmp_path / n) for n in ("miss", "again", "bone"))
    assert (miss["peft_type"], miss["bias"]) == ("MISS", "MiSS_only")
    assert (again["peft_type"], again["bias"]) == ("BONE", "bone_only")
    assert {name: again[name] for name in old} == old
    assert not {"mini_r", "miss_dropout", "axis", "peft_version"} & again.keys()
    assert miss["a_field_of_the_future"] == {"kept": [1, 2.5, None]}


def test_the_written_config_has_the_fields_of_peft_0_14(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", peft_type="MISS", miss_dropout=0.1, peft_version="0.18")
    result = boneconv.convert(adapter, tmp_path / "out", to="peft-bone")
    assert set(config_of(tmp_path / "out")) == {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "inference_mode",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "r",
        "revision",
        "target_modules",
        "task_type",
    }
    assert result.notes == ("left out: miss_dropout 0.1 (it matters in training only)",)


def test_mini_is_for_miss_alone(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", "mini")
    boneconv.convert(adapter, tmp_path / "miss", to="peft-miss")
    assert_same(adapter, tmp_path / "miss")
    assert config_of(tmp_path / "miss")["mini_r"] == 2
    with pytest.raises(UsageError, match="mini exists in MiSS alone"):
        boneconv.convert(adapter, tmp_path / "bone", to="peft-bone")
    assert not list(tmp_path.glob("bone*"))


def test_a_tokenizer_goes_along(tmp_path: Path) -> None:
    files = {"tokenizer.json": "{}", "additional_chat_templates/tool.jinja": "{{ x }}"}
    adapter = make_adapter(tmp_path / "a", files=files | {"notes.txt": "mine"})
    for to, more in (("peft-miss", {}), ("peft-lora", {"base": make_base(tmp_path / "base")})):
        boneconv.convert(adapter, tmp_path / to, to=to, **more)
        assert set(snapshot(tmp_path / to)) == FOLDER | set(files)


def test_a_weight_below_a_block_keeps_its_place(tmp_path: Path) -> None:
    """PEFT's model holds it one level deeper, where the block's layer keeps its base layer."""
    saved = {f"{module(0, Q)}.weight": grid((HIDDEN, HIDDEN)), f"{module(0, Q)}.bias": grid((12,))}
    adapter = make_adapter(tmp_path / "a", saved=saved)
    boneconv.convert(adapter, tmp_path / "miss", to="peft-miss")
    names = set(unpack(tmp_path / "miss" / TENSORS))
    prefix = f"base_model.model.{module(0, Q)}.base_layer"
    assert {f"{prefix}.weight", f"{prefix}.bias"} <= names
    assert_same(adapter, tmp_path / "miss")


# --- RWKV-PEFT --------------------------------------------------------------------------------


def test_bone_goes_to_rwkv_and_back(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", blocks=blocks_for_all(dtype=BF16))
    result = boneconv.convert(adapter, tmp_path / "a.pth", to="rwkv")
    assert result.record == tmp_path / "a.pth.boneconv.json"
    boneconv.convert(tmp_path / "a.pth", tmp_path / "bone", to="peft-bone")
    assert_same(adapter, tmp_path / "bone")
    assert config_of(tmp_path / "bone")["target_modules"] == sorted(read_adapter(adapter).blocks)


def test_bat_keeps_the_axis_that_its_format_means(tmp_path: Path) -> None:
    out_axis = make_adapter(tmp_path / "a", "bat")
    with pytest.raises(UsageError, match="over the output axis"):
        boneconv.convert(out_axis, tmp_path / "a.pth", to="rwkv")
    import torch

    block = torch.from_numpy(grid((3, 4, 4)))
    torch.save({f"{module(0, Q)}.disha": block}, tmp_path / "b.pth")
    for to in ("peft-bone", "peft-miss"):
        with pytest.raises(UsageError, match="over the input axis"):
            boneconv.convert(tmp_path / "b.pth", tmp_path / "out", to=to)
    boneconv.convert(tmp_path / "b.pth", tmp_path / "native", to="native")
    assert_same(tmp_path / "b.pth", tmp_path / "native")
    assert next(iter(read_adapter(tmp_path / "native").blocks.values())).axis is Axis.IN
    boneconv.convert(tmp_path / "native", tmp_path / "again.pth", to="rwkv")
    assert_same(tmp_path / "b.pth", tmp_path / "again.pth")


# --- native -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["bone", "bat", "mini"])
@pytest.mark.parametrize("out", ["native", "native.safetensors"])
def test_an_adapter_goes_to_native_and_back(tmp_path: Path, variant: str, out: str) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(
        tmp_path / "a",
        variant,
        saved={NORM: grid((HIDDEN,))},
        modules_to_save=["layers.0.norm"],
        base_model_name_or_path="owner/name",
    )
    result = boneconv.convert(adapter, tmp_path / out, to="native", base=base)
    assert result.record is None
    assert_same(adapter, tmp_path / out)
    native = read_adapter(tmp_path / out)
    assert native.format == "native"
    assert native.config.base_model_name_or_path == "owner/name"
    assert native.fingerprint is not None
    assert set(native.base_digests) == {f"{name}.weight" for name in native.blocks}
    boneconv.convert(tmp_path / out, tmp_path / "again", to="peft-miss")
    assert_same(adapter, tmp_path / "again")
    boneconv.merge(base, adapter, tmp_path / "one", card=False)
    boneconv.merge(base, tmp_path / out, tmp_path / "two", card=False)
    one, two = (unpack(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert all(same_bits(one[name], two[name]) for name in one if name != "model.position_ids")


def test_without_a_base_there_is_no_fingerprint(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", "bat")
    boneconv.convert(adapter, tmp_path / "plain", to="native")
    assert read_adapter(tmp_path / "plain").fingerprint is None
    base = make_base(tmp_path / "base")
    boneconv.convert(tmp_path / "plain", tmp_path / "marked", to="native", base=base)
    assert read_adapter(tmp_path / "marked").fingerprint is not None
    other = make_base(tmp_path / "other", base_tensors(seed=5))
    for to, more in (("native", {}), ("peft-lora", {"rank": 12})):
        with pytest.raises(BaseMismatchError, match="6 of 6 weights"):
            boneconv.convert(tmp_path / "marked", tmp_path / "x", to=to, base=other, **more)
    assert not list(tmp_path.glob("x*"))


def test_a_weight_below_a_block_is_left_out_where_it_is_the_bases(tmp_path: Path) -> None:
    tensors = base_tensors(F32)
    base, name = make_base(tmp_path / "base", tensors), f"{module(0, Q)}.weight"
    adapter = make_adapter(tmp_path / "a", saved={name: tensors[name]})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="Give the base with --base"):
        boneconv.convert(adapter, tmp_path / "n", to="native")
    boneconv.convert(adapter, tmp_path / "n", to="native", base=base)
    assert read_adapter(tmp_path / "n").saved == {}
    trained = make_adapter(tmp_path / "b", saved={name: grid((HIDDEN, HIDDEN), F32, 77)})
    with pytest.raises(UsageError, match="brings the weight below a block"):
        boneconv.convert(trained, tmp_path / "m", to="native", base=base)


# --- where exactness ends ---------------------------------------------------------------------


def test_a_lora_is_no_way_back(tmp_path: Path) -> None:
    """A LoRA does not say that it was Bone: that round trip ends there, openly."""
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a")
    boneconv.convert(adapter, tmp_path / "l", to="peft-lora", base=base)
    with pytest.raises(InputError, match="LORA"):
        boneconv.convert(tmp_path / "l", tmp_path / "b", to="peft-bone")


def test_bats_lora_is_not_exact_below_full_rank(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a", "bat")
    options: dict[str, Any] = {"to": "peft-lora", "base": base, "max_error": 1.0}
    below = boneconv.convert(adapter, tmp_path / "11", rank=11, **options)
    full = boneconv.convert(adapter, tmp_path / "12", rank=12, **options)
    assert 0.0 < full.worst_error < 1e-6 < below.worst_error


def test_native_keeps_the_modules_but_not_how_the_config_found_them(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", target_modules=r".*\.(q|up|down)_proj", future_field=1)
    boneconv.convert(adapter, tmp_path / "native", to="native")
    boneconv.convert(tmp_path / "native", tmp_path / "again", to="peft-bone")
    assert_same(adapter, tmp_path / "again")
    assert config_of(tmp_path / "again")["target_modules"] == sorted(read_adapter(adapter).blocks)
    assert "future_field" not in config_of(tmp_path / "again")


# --- the record -------------------------------------------------------------------------------


def test_the_record_says_what_was_made_of_what(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a", "bat")
    options: dict[str, Any] = {"to": "peft-lora", "base": base, "rank": 6, "max_error": 0.9}
    boneconv.convert(adapter, tmp_path / "one", **options)
    boneconv.convert(adapter, tmp_path / "two", **options)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    record = record_of(tmp_path / "one")
    assert record["converted_to"] == "peft-lora"
    assert record["adapter"]["variant"] == "bat"
    assert record["options"] == {"rank": 6, "energy": None, "max_error": 0.9, "pad_rank": False}
    assert set(record["modules"]) == set(read_adapter(adapter).blocks)
    assert str(tmp_path) not in json.dumps(record)
