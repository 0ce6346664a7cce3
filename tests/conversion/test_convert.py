"""`boneconv.convert`: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import boneconv
from boneconv.config import Axis, Variant
from boneconv.errors import (
    BaseMismatchError,
    CheckFailedError,
    FormatError,
    InputError,
    MachineError,
    NameMatchError,
    NonFiniteError,
    OutputExistsError,
    ShapeError,
    UsageError,
)
from boneconv.formats import read_adapter
from boneconv.formats.writing import TensorFile
from tests.builders import (
    BF16,
    DOWN,
    EMBEDDING,
    F16,
    F32,
    F64,
    HIDDEN,
    RANK,
    VOCABULARY,
    Q,
    Raw,
    base_tensors,
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

NORM = f"{module(0, 'norm')}.weight"
TENSORS = "adapter_model.safetensors"
FOLDER = {"adapter_config.json", TENSORS, "boneconv.json"}


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "boneconv.json").read_text())
    return found


def _same(one: Path, other: Path) -> None:
    """Two adapters that do the same, every tensor equal in bits."""
    a, b = read_adapter(one), read_adapter(other)
    assert a.blocks.keys() == b.blocks.keys()
    for name, block in a.blocks.items():
        again = b.blocks[name]
        assert same_bits(block.tensor.read(), again.tensor.read())
        assert (block.variant, block.rank, block.mini_rank) == (
            again.variant,
            again.rank,
            again.mini_rank,
        )
        assert block.variant is not Variant.BAT or block.axis is again.axis
    assert a.saved.keys() == b.saved.keys()
    assert all(same_bits(t.read(), b.saved[n].read()) for n, t in a.saved.items())


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
    _same(adapter, tmp_path / "miss")
    _same(adapter, tmp_path / "again")
    miss, again, old = (_config(tmp_path / n) for n in ("miss", "again", "bone"))
    assert (miss["peft_type"], miss["bias"]) == ("MISS", "MiSS_only")
    assert (again["peft_type"], again["bias"]) == ("BONE", "bone_only")
    assert {name: again[name] for name in old} == old
    assert not {"mini_r", "miss_dropout", "axis", "peft_version"} & again.keys()
    assert miss["a_field_of_the_future"] == {"kept": [1, 2.5, None]}


def test_the_written_config_has_the_fields_of_peft_0_14(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", peft_type="MISS", miss_dropout=0.1, peft_version="0.18")
    result = boneconv.convert(adapter, tmp_path / "out", to="peft-bone")
    assert set(_config(tmp_path / "out")) == {
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
    _same(adapter, tmp_path / "miss")
    assert _config(tmp_path / "miss")["mini_r"] == 2
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
    _same(adapter, tmp_path / "miss")


# --- RWKV-PEFT --------------------------------------------------------------------------------


def test_bone_goes_to_rwkv_and_back(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", blocks=blocks_for_all(dtype=BF16))
    result = boneconv.convert(adapter, tmp_path / "a.pth", to="rwkv")
    assert result.record == tmp_path / "a.pth.boneconv.json"
    boneconv.convert(tmp_path / "a.pth", tmp_path / "bone", to="peft-bone")
    _same(adapter, tmp_path / "bone")
    assert _config(tmp_path / "bone")["target_modules"] == sorted(read_adapter(adapter).blocks)


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
    _same(tmp_path / "b.pth", tmp_path / "native")
    assert next(iter(read_adapter(tmp_path / "native").blocks.values())).axis is Axis.IN
    boneconv.convert(tmp_path / "native", tmp_path / "again.pth", to="rwkv")
    _same(tmp_path / "b.pth", tmp_path / "again.pth")


# --- LoRA -------------------------------------------------------------------------------------


def _check_lora(adapter: Path, base: Path, out: Path, *, error: float = 0.0) -> None:
    """Every factor pair gives the update of the merge, to the error that the record names."""
    config, record = _config(out), _record(out)
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
    config = _config(tmp_path / "lora")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", rank, rank)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    _check_lora(adapter, base, tmp_path / "lora")


@pytest.mark.parametrize(("rank", "padded"), [(3, 8), (8, 8), (9, 16), (300, 320), (513, 513)])
def test_a_rank_is_padded_to_one_that_vllm_serves(tmp_path: Path, rank: int, padded: int) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", rank=rank, blocks=blocks_for_all(rank=rank))
    result = boneconv.convert(adapter, tmp_path / "l", to="peft-lora", base=base, pad_rank=True)
    assert result.rank == _config(tmp_path / "l")["r"] == _config(tmp_path / "l")["lora_alpha"]
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
        assert result.rank == rank == _config(out)["r"]
        assert _record(out)["worst_error"] == pytest.approx(result.worst_error, rel=1e-3)
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
    assert _record(less)["worst_error"] > np.sqrt(0.05)


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
    _same(adapter, tmp_path / out)
    native = read_adapter(tmp_path / out)
    assert native.format == "native"
    assert native.config.base_model_name_or_path == "owner/name"
    assert native.fingerprint is not None
    assert set(native.base_digests) == {f"{name}.weight" for name in native.blocks}
    boneconv.convert(tmp_path / out, tmp_path / "again", to="peft-miss")
    _same(adapter, tmp_path / "again")
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
    _same(adapter, tmp_path / "again")
    assert _config(tmp_path / "again")["target_modules"] == sorted(read_adapter(adapter).blocks)
    assert "future_field" not in _config(tmp_path / "again")


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("bone", {"to": "gguf"}, "cannot convert to 'gguf'"),
        ("bone", {"to": "peft-miss", "rank": 4}, "belong to --to peft-lora"),
        ("bone", {"to": "peft-miss", "base": "base"}, "--base belongs to"),
        ("bone", {"to": "native", "pad_rank": True}, "belong to --to peft-lora"),
        ("bone", {"to": "peft-lora"}, "does not say how wide"),
        ("bone", {"to": "peft-lora", "base": "base", "rank": 4}, "becomes a LoRA exactly"),
        ("mini", {"to": "peft-lora", "base": "base", "energy": 0.9}, "becomes a LoRA exactly"),
        ("bat", {"to": "peft-lora", "base": "base"}, "by approximation only"),
        ("bat", {"to": "peft-lora", "base": "base", "rank": 4, "energy": 0.9}, "exclude each"),
        ("bat", {"to": "peft-lora", "base": "base", "rank": 0}, "must be positive"),
        ("bat", {"to": "peft-lora", "base": "base", "energy": 1.5}, "is a share"),
        ("bat", {"to": "peft-lora", "base": "base", "energy": float("nan")}, "is a share"),
        ("bat", {"to": "peft-lora", "base": "base", "rank": 4, "max_error": -1.0}, "negative"),
        ("bat", {"to": "peft-lora", "base": "base", "max_error": float("nan")}, "negative"),
        ("bone", {"to": "rwkv"}, "is one file"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, variant: str, options: dict[str, Any], message: str
) -> None:
    adapter = make_adapter(tmp_path / "a", variant)
    if "base" in options:
        options = options | {"base": make_base(tmp_path / "base")}
    with pytest.raises(UsageError, match=message):
        boneconv.convert(adapter, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("to", "out"), [("peft-miss", "a.safetensors"), ("peft-lora", "a.pth"), ("native", "a.pth")]
)
def test_a_folder_is_not_named_like_a_file(tmp_path: Path, to: str, out: str) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        boneconv.convert(make_adapter(tmp_path / "a"), tmp_path / out, to=to)


def test_the_output_is_never_an_input_and_never_overwritten(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputExistsError):
        boneconv.convert(adapter, tmp_path / "there", to="peft-miss")
    boneconv.convert(adapter, tmp_path / "there", to="peft-miss", force=True)
    assert set(snapshot(tmp_path / "there")) == FOLDER
    before = snapshot(adapter)
    for out in (adapter, adapter / "inside", tmp_path):
        with pytest.raises(UsageError, match="must not be, hold or lie in an input"):
            boneconv.convert(adapter, out, to="peft-miss", force=True)
    assert snapshot(adapter) == before


def test_a_base_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    tensors = base_tensors()
    del tensors[f"{module(1, DOWN)}.weight"]
    lacking = make_base(tmp_path / "lacking", tensors)
    wide = make_base(tmp_path / "wide", base_tensors() | {f"{module(0, Q)}.weight": grid((16, 12))})
    quantised = make_base(
        tmp_path / "q",
        base_tensors()
        | {f"{module(0, Q)}.weight": Raw("U8", (HIDDEN, HIDDEN), bytes(HIDDEN * HIDDEN))},
    )
    for base, error in ((lacking, NameMatchError), (wide, ShapeError), (quantised, InputError)):
        with pytest.raises(error, match=r"q_proj|down_proj"):
            boneconv.convert(adapter, tmp_path / "out", to="peft-lora", base=base)
    assert not list(tmp_path.glob("out*"))


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    blocks = blocks_for_all("bat")
    blocks[module(1, Q)] = np.full((HIDDEN // RANK, RANK, RANK), np.nan, F32)
    adapter = make_adapter(tmp_path / "a", "bat", blocks=blocks)
    base = make_base(tmp_path / "base")
    with pytest.raises(NonFiniteError, match=r"'model\.layers\.1\.self_attn\.q_proj'"):
        boneconv.convert(adapter, tmp_path / "out", to="peft-lora", base=base, rank=2)
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_without_blocks_is_no_lora(tmp_path: Path) -> None:
    saved = {EMBEDDING: grid((VOCABULARY, HIDDEN))}
    adapter = make_adapter(tmp_path / "a", blocks={}, saved=saved)
    with pytest.raises(UsageError, match="no blocks"):
        boneconv.convert(adapter, tmp_path / "l", to="peft-lora", base=make_base(tmp_path / "b"))


# --- it checks itself -------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["peft-bone", "peft-miss", "peft-lora", "rwkv"])
def test_a_file_that_reads_back_differently_is_not_published(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses a byte on the way."""
    write = TensorFile._write
    lost = []

    def lossy(self: TensorFile, hasher: Any, data: memoryview, offset: int) -> None:
        write(self, hasher, data, offset)
        if not lost:
            lost.append(offset)
            self._writer.write_at(bytes([data[0] ^ 1]), offset)

    monkeypatch.setattr(TensorFile, "_write", lossy)
    adapter = make_adapter(tmp_path / "a")
    out = tmp_path / ("out.pth" if to == "rwkv" else "out")
    more = {"base": make_base(tmp_path / "base")} if to == "peft-lora" else {}
    with pytest.raises(MachineError, match="reads back differently"):
        boneconv.convert(adapter, out, to=to, **more)
    assert lost
    assert not out.exists()


def test_a_damaged_adapter_leaves_nothing_behind(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    weights = adapter / TENSORS
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(FormatError):
        boneconv.convert(adapter, tmp_path / "out", to="peft-miss")
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


# --- the record -------------------------------------------------------------------------------


def test_the_record_says_what_was_made_of_what(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a", "bat")
    options: dict[str, Any] = {"to": "peft-lora", "base": base, "rank": 6, "max_error": 0.9}
    boneconv.convert(adapter, tmp_path / "one", **options)
    boneconv.convert(adapter, tmp_path / "two", **options)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    record = _record(tmp_path / "one")
    assert record["converted_to"] == "peft-lora"
    assert record["adapter"]["variant"] == "bat"
    assert record["options"] == {"rank": 6, "energy": None, "max_error": 0.9, "pad_rank": False}
    assert set(record["modules"]) == set(read_adapter(adapter).blocks)
    assert str(tmp_path) not in json.dumps(record)
