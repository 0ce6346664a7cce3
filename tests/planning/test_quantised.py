"""FP8 bases are dequantised exactly, merged and rounded once; other quantised ones are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from boneconv.errors import FormatError, InputError, NonFiniteError, UsageError
from boneconv.kernels.exact import round_fraction
from boneconv.merging import merge
from boneconv.planning import plan_merge
from boneconv.unmerging import unmerge
from boneconv.verification import verify
from tests.builders import (
    BF16,
    EMBEDDING,
    F16,
    F32,
    F64,
    Array,
    Raw,
    base_tensors,
    block_for,
    grid,
    make_adapter,
    make_base,
    merged,
    module,
    pack,
    same_bits,
    unpack,
    unpack_folder,
)

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
CONFIG: dict[str, Any] = {
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [8, 8],
    },
}
Q0, UP0 = f"{module(0, 'self_attn.q_proj')}.weight", f"{module(0, 'mlp.up_proj')}.weight"
NORM = "model.layers.0.norm.weight"
METHOD = {"quantization_config": {"quant_method": "fp8"}}


def _eight(array: Array) -> Raw:
    return Raw("F8_E4M3", array.shape, array.astype(E4M3).tobytes())


def _weight(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Values that are float8 values, with every exponent that occurs."""
    rng = np.random.default_rng([seed, *shape])
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x12
    return np.asarray(codes.view(E4M3).astype(F64))


def _scales(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Scales with all 24 bits in use."""
    rng = np.random.default_rng([seed, *shape, 1])
    return np.asarray(rng.uniform(0.5, 1.5, shape) * 2.0**-8).astype(F32)


def _spread(scale: Array, block: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """A scale for each element."""
    wide = scale.astype(F64).repeat(block[0], axis=-2).repeat(block[1], axis=-1)
    return wide[..., : shape[-2], : shape[-1]]


def _quantised(block: tuple[int, int] = (8, 8)) -> tuple[dict[str, Array | Raw], dict[str, Array]]:
    """A base whose linear weights are float8 in blocks, and what their values are."""
    tensors: dict[str, Array | Raw] = {}
    values = {}
    for name, tensor in base_tensors(BF16).items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor
            continue
        weight = _weight(tensor.shape, len(name))
        scale = _scales(tuple(-(-n // b) for n, b in zip(tensor.shape, block, strict=True)))
        tensors[name], tensors[f"{name}_scale_inv"] = _eight(weight), scale
        values[name] = weight * _spread(scale, block, tensor.shape)
    return tensors, values


def _blocks(variant: str) -> dict[str, Array]:
    return {
        name.removesuffix(".weight"): block_for(variant, shape)
        for name, shape in {Q0: (12, 12), UP0: (20, 12)}.items()
    }


DTYPES = {"float32": F32, "bfloat16": BF16, "float16": F16}


# --- dequantising -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["bone", "bat", "mini"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_dequantised_exactly_merged_and_rounded_once(
    tmp_path: Path, variant: str, dtype: str
) -> None:
    tensors, values = _quantised()
    base = make_base(tmp_path / "base", tensors, shards=3, config=CONFIG)
    blocks = _blocks(variant)
    make_adapter(tmp_path / "adapter", variant, blocks=blocks)
    result = merge(base, tmp_path / "adapter", tmp_path / "out", dtype=dtype, workers=2)
    found, target = unpack_folder(result.out), DTYPES[dtype]
    assert set(found) == {name for name in tensors if not name.endswith("_scale_inv")}
    for name, value in values.items():
        block = blocks.get(name.removesuffix(".weight"))
        expected = value.astype(target) if block is None else _exact(value, block, variant, target)
        assert same_bits(found[name], expected), name
    assert same_bits(found[EMBEDDING], np.asarray(tensors[EMBEDDING]).astype(target))
    config = json.loads((result.out / "config.json").read_text())
    assert config == {"torch_dtype": dtype}
    assert result.counts["merge"] == 2
    assert any("6 FP8 weights are dequantised, and 6 tensors" in note for note in result.notes)


def _exact(value: Array, block: Array, variant: str, target: Any) -> Array:
    """The merged weight in rational arithmetic, rounded once."""
    r = block.shape[-1] if variant == "bat" else block.shape[0]
    w = [[Fraction(float(element)) for element in row] for row in value]
    b = np.vectorize(Fraction, otypes=[object])(block.astype(F64))
    out = np.empty(value.shape, target)
    for i, j in np.ndindex(*value.shape):
        if variant == "bat":
            tile, row, column = b[i // r], i % r, j % r
            start = j - column
            products = (w[i][start + k] * tile[k, column] for k in range(r))
            change = tile[row, column] + sum(products)
        else:
            change = b[j % r, i % block.shape[1]]
        out[i, j] = round_fraction(w[i][j] + change, target)
    return out


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_do_not_depend_on_workers_or_shards(tmp_path: Path, workers: int) -> None:
    tensors, _ = _quantised()
    make_adapter(tmp_path / "adapter", blocks=_blocks("bone"))
    outs = []
    for shards in (1, 4):
        base = make_base(tmp_path / f"base{shards}", tensors, shards=shards, config=CONFIG)
        out = tmp_path / f"out{shards}"
        merge(base, tmp_path / "adapter", out, dtype="bfloat16", workers=workers)
        outs.append(unpack_folder(out))
    assert all(same_bits(outs[0][name], outs[1][name]) for name in outs[0])


SHAPES = [
    ((), None),
    ((1,), None),
    ((1, 1), None),
    ((12,), (1, 12)),
    ((12, 1), (1, 12)),
    ((2, 2), (8, 8)),
]


@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_one_scale_or_one_for_each_row_or_block(
    tmp_path: Path, shape: tuple[int, ...], block: tuple[int, int] | None, suffix: str
) -> None:
    weight, scale = _weight((12, 12)), np.asarray(_scales(shape))
    tensors = base_tensors(BF16) | {Q0: _eight(weight), f"{Q0}{suffix}": scale}
    tensors |= {Q0.replace("weight", "input_scale"): np.ones((), F32)}
    found = _merge(tmp_path, tensors, config=CONFIG, dtype="float32")
    each = scale.reshape(1, 1) if block is None else scale.reshape(-1, 2 if block == (8, 8) else 1)
    value = weight * _spread(each, block or (12, 12), (12, 12))
    assert same_bits(found[Q0], value.astype(F32))
    assert not any("scale" in name for name in found)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E8M0"])
def test_scales_of_other_dtypes(tmp_path: Path, dtype: str) -> None:
    weight = _weight((12, 12))
    exponents = np.arange(4, dtype=np.uint8).reshape(2, 2) + 120
    value = np.ldexp(1.0, exponents.astype(int) - 127)
    scale: Any = Raw(dtype, (2, 2), exponents.tobytes())
    if dtype != "F8_E8M0":
        scale = value.astype({"BF16": BF16, "F16": F16}[dtype])
    tensors = base_tensors(BF16) | {Q0: _eight(weight), f"{Q0}_scale_inv": scale}
    found = _merge(tmp_path, tensors, config=CONFIG, dtype="float32")
    assert same_bits(found[Q0], (weight * _spread(value, (8, 8), (12, 12))).astype(F32))


def test_stacked_weights_have_blocks_of_their_own(tmp_path: Path) -> None:
    weight, scale = _weight((3, 12, 20)), _scales((3, 2, 3))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = base_tensors(BF16) | {name: _eight(weight), f"{name}_scale_inv": scale}
    found = _merge(tmp_path, tensors, config=CONFIG, dtype="float32", workers=2)
    value = np.stack([w * _spread(s, (8, 8), (12, 20)) for w, s in zip(weight, scale, strict=True)])
    assert same_bits(found[name], value.astype(F32))


def test_weights_of_many_segments(tmp_path: Path) -> None:
    shape = (5000, 640)  # a few segments of output, blocks that end within chunks
    weight, scale = _weight(shape), _scales((40, 5))
    tensors = {Q0: _eight(weight), f"{Q0}_scale_inv": scale}
    block = grid((4, 5000), F32)
    make_base(tmp_path / "base", tensors, config=METHOD)
    make_adapter(tmp_path / "adapter", blocks={Q0.removesuffix(".weight"): block})
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16", workers=2)
    value = weight * _spread(scale, (128, 128), shape)
    update = block.T[:, np.arange(640) % 4].astype(F64)
    found = unpack(tmp_path / "out" / "model.safetensors")[Q0].astype(F64)
    ulp = np.exp2(np.floor(np.log2(np.maximum(np.abs(value + update), 2.0**-120))) - 7)
    assert (np.abs(found - (value + update)) <= ulp / 2).all()


def test_unscaled_float8_are_their_own_values(tmp_path: Path) -> None:
    weight = _weight((12, 12))
    result_notes: list[str] = []
    found = _merge(
        tmp_path, base_tensors(BF16) | {Q0: _eight(weight)}, dtype="float32", notes=result_notes
    )
    assert same_bits(found[Q0], weight.astype(F32))
    assert any("1 of the weights have no scale" in note for note in result_notes)


def test_one_file(tmp_path: Path) -> None:
    tensors, values = _quantised((128, 128))
    (tmp_path / "base.safetensors").write_bytes(pack(tensors))
    make_adapter(tmp_path / "adapter", blocks=_blocks("bone"))
    out = tmp_path / "out.safetensors"
    merge(tmp_path / "base.safetensors", tmp_path / "adapter", out, dtype="float32")
    name = f"{module(1, 'mlp.down_proj')}.weight"
    assert same_bits(unpack(out)[name], values[name].astype(F32))


def test_several_adapters_and_a_scale(tmp_path: Path) -> None:
    tensors, values = _quantised()
    make_base(tmp_path / "base", tensors, config=CONFIG)
    one, two = _blocks("bone"), _blocks("mini")
    make_adapter(tmp_path / "one", blocks=one)
    make_adapter(tmp_path / "two", "mini", blocks=two)
    merge(
        tmp_path / "base",
        tmp_path / "one",
        tmp_path / "out",
        more=[tmp_path / "two"],
        scale=0.5,
        dtype="float32",
    )
    module_name = Q0.removesuffix(".weight")
    first = merged(np.zeros((12, 12), F64), one[module_name], "bone", scale=0.5)
    second = merged(np.zeros((12, 12), F64), two[module_name], "mini", scale=0.5)
    expected = (values[Q0] + (first + second)).astype(F32)  # multiples of 1/32: float64 holds them
    assert same_bits(unpack(tmp_path / "out" / "model.safetensors")[Q0], expected)


def test_a_replaced_weight_drops_its_scale(tmp_path: Path) -> None:
    tensors, _ = _quantised()
    saved = {UP0: grid((20, 12), F32, 9)}
    q = Q0.removesuffix(".weight")
    make_base(tmp_path / "base", tensors, config=CONFIG)
    make_adapter(
        tmp_path / "adapter",
        blocks={q: _blocks("bone")[q]},
        saved=saved,
        modules_to_save=["up_proj"],
    )
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    found = unpack(tmp_path / "out" / "model.safetensors")
    assert same_bits(found[UP0], saved[UP0].astype(BF16))
    assert f"{UP0}_scale_inv" not in found


def test_the_index_is_made_anew(tmp_path: Path) -> None:
    tensors, _ = _quantised()
    make_base(tmp_path / "base", tensors, shards=3, config=CONFIG)
    make_adapter(tmp_path / "adapter", blocks=_blocks("bone"))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = unpack_folder(tmp_path / "out")
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())


def test_a_shard_of_scales_alone_is_left_away(tmp_path: Path) -> None:
    tensors, _ = _quantised()
    ordered = dict(sorted(tensors.items(), key=lambda item: item[0].endswith("_scale_inv")))
    make_base(tmp_path / "base", ordered, shards=len(ordered), config=CONFIG)
    make_adapter(tmp_path / "adapter", blocks=_blocks("bone"))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    kept = [name for name in tensors if not name.endswith("_scale_inv")]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(kept)


def test_the_record_says_what_was_dequantised(tmp_path: Path) -> None:
    tensors, _ = _quantised()
    make_base(tmp_path / "base", tensors, config=CONFIG)
    make_adapter(tmp_path / "adapter", blocks=_blocks("bone"))
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    record = json.loads(result.record.read_text())
    down = f"{module(0, 'mlp.down_proj')}.weight"
    assert record["tensors"][Q0]["action"] == "merge"
    assert record["tensors"][down]["action"] == "cast"
    for name in (Q0, down):
        assert record["tensors"][name]["dequantised"] == {
            "dtype": "F8_E4M3",
            "scale": f"{name}_scale_inv",
        }
    assert "dequantised" not in record["tensors"][EMBEDDING]
    planned = plan_merge(tmp_path / "base", tmp_path / "adapter", dtype="bfloat16")
    assert planned.plan.record_bytes == len(result.record.read_bytes())


def test_verify_holds_the_result_against_the_quantised_base(tmp_path: Path) -> None:
    tensors, _ = _quantised()
    make_base(tmp_path / "base", tensors, shards=2, config=CONFIG)
    make_adapter(tmp_path / "adapter", blocks=_blocks("bat"), variant="bat")
    out = tmp_path / "out"
    merge(tmp_path / "base", tmp_path / "adapter", out, dtype="bfloat16")
    report = verify(tmp_path / "base", tmp_path / "adapter", out, workers=1)
    assert report.passed
    shard = next(p for p in sorted(out.glob("*.safetensors")) if Q0 in unpack(p))
    for name in (Q0, f"{module(0, 'mlp.down_proj')}.weight"):
        before = shard.read_bytes()
        wrong = unpack(shard)
        if name not in wrong:
            continue
        wrong[name] = (wrong[name].astype(F32) * F32.type(1.5)).astype(BF16)
        shard.write_bytes(pack(wrong, {"format": "pt"}))
        found = verify(tmp_path / "base", tmp_path / "adapter", out, workers=1)
        assert [t.name for t in found.tensors if t.status.value == "fail"] == [name]
        shard.write_bytes(before)


def test_transformers_dequantises_to_the_same_values(tmp_path: Path) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        FineGrainedFP8Config,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}
    config = LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=4, vocab_size=64, dtype="bfloat16"
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    tensors: dict[str, Array | Raw] = {}
    for name, weight in unpack(tmp_path / "plain" / "model.safetensors").items():
        tensors[name] = weight
        if "proj" in name:
            tensors[f"{name}_scale_inv"] = _scales((weight.shape[0] // 128, weight.shape[1] // 128))
            tensors[name] = _eight(_weight(weight.shape))
    values = json.loads((tmp_path / "plain" / "config.json").read_text())
    values["quantization_config"] = CONFIG["quantization_config"] | {"weight_block_size": [128] * 2}
    base = make_base(tmp_path / "base", tensors, config=values)
    zero = {"model.layers.0.self_attn.q_proj": np.zeros((4, 256), F32)}
    make_adapter(tmp_path / "adapter", blocks=zero)
    merge(base, tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    own, others = mine.state_dict(), theirs.state_dict()
    assert own.keys() == others.keys()
    assert all(own[name].dtype == torch.bfloat16 for name in own)
    assert all(torch.equal(own[name], others[name]) for name in own)


# --- refusals ---------------------------------------------------------------------------------


def _merge(
    tmp_path: Path,
    tensors: Mapping[str, Array | Raw],
    *,
    config: Mapping[str, Any] | None = None,
    notes: list[str] | None = None,
    **options: Any,
) -> dict[str, Array]:
    """Merges into the second layer, which is not quantised."""
    make_base(tmp_path / "base", tensors, config=config)
    name = module(1, "self_attn.q_proj")
    make_adapter(tmp_path / "adapter", blocks={name: grid((4, 12), F32)})
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    if notes is not None:
        notes += result.notes
    return unpack_folder(tmp_path / "out")


def test_without_a_dtype_the_way_out_is_said(tmp_path: Path) -> None:
    tensors, _ = _quantised()
    for number, config in enumerate((CONFIG, {})):
        with pytest.raises(FormatError, match=r"FP8 with scales.*Give --dtype bfloat16"):
            _merge(tmp_path / str(number), tensors, config=config)
    assert not (tmp_path / "0" / "out").exists()


def test_unscaled_float8_beside_the_adapted_weights_are_kept(tmp_path: Path) -> None:
    eight = _eight(_weight((12, 12)))
    make_base(tmp_path / "base", base_tensors(BF16) | {Q0: eight})
    make_adapter(tmp_path / "adapter", blocks={module(1, "self_attn.q_proj"): grid((4, 12), F32)})
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert eight.data in content


SCALE = np.full((2, 2), 0.5, F32)
EIGHT = _eight(np.ones((12, 12)))
UNCLEAR: dict[str, tuple[dict[str, Any], Any, str]] = {
    "another shape": ({Q0: EIGHT, f"{Q0}_scale": np.ones((3, 5), F32)}, CONFIG, "cannot be told"),
    "no scale": ({Q0: EIGHT}, CONFIG, "without a scale that is known"),
    "a scale by another name": (
        {Q0: EIGHT, f"{Q0.removesuffix('weight')}scale_weight": np.ones((), F32)},
        {},
        "without a scale that is known, though it has scales",
    ),
    "a marker of scales": ({Q0: EIGHT, "scaled_fp8": SCALE}, {}, "though it has scales"),
    "two scales": ({Q0: EIGHT, f"{Q0}_scale": SCALE, f"{Q0}_scale_inv": SCALE}, CONFIG, "two scal"),
    "scales in float64": ({Q0: EIGHT, f"{Q0}_scale": SCALE.astype(F64)}, CONFIG, "not exact"),
    "a scale of another weight": (
        {Q0: EIGHT, f"{Q0}_scale": SCALE, f"{UP0}_scale": SCALE},
        CONFIG,
        "scales of weights that are not FP8",
    ),
    "no dimensions": (
        {"model.x": Raw("F8_E4M3", (), b"\0"), Q0: EIGHT, f"{Q0}_scale": SCALE},
        {},
        "cannot be told",
    ),
    "nothing in float8": ({}, CONFIG, "the base is quantised"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_cannot_be_told_is_refused(tmp_path: Path, case: str) -> None:
    tensors, config, message = UNCLEAR[case]
    with pytest.raises(FormatError, match=message):
        _merge(tmp_path, base_tensors(BF16) | tensors, config=config, dtype="bfloat16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_not_finite(tmp_path: Path, value: float) -> None:
    tensors = base_tensors(BF16) | {Q0: EIGHT, f"{Q0}_scale": np.full((2, 2), value, F32)}
    with pytest.raises(NonFiniteError, match=r"the scale .* is not finite"):
        _merge(tmp_path, tensors, config=CONFIG, dtype="bfloat16")


def test_a_dequantised_value_beyond_the_dtype(tmp_path: Path) -> None:
    tensors = base_tensors(BF16) | {Q0: EIGHT, f"{Q0}_scale": np.full((2, 2), 1e6, F32)}
    with pytest.raises(NonFiniteError, match=r"dequantised value.*range of float16"):
        _merge(tmp_path, tensors, config=CONFIG, dtype="float16")


def test_no_delta_file_and_no_unmerge(tmp_path: Path) -> None:
    tensors, _ = _quantised()
    make_base(tmp_path / "base", tensors, config=CONFIG)
    adapter = make_adapter(tmp_path / "adapter", blocks=_blocks("bone"))
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="a delta file cannot restore quantised weights"):
        merge(tmp_path / "base", adapter, out, dtype="bfloat16", keep_delta=tmp_path / "d.delta")
    assert not out.exists()
    merge(tmp_path / "base", adapter, out, dtype="bfloat16")
    with pytest.raises(InputError, match=r"lost: dequantised.*Take the base itself"):
        unmerge(out, adapter, tmp_path / "back")


PACKED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"a.weight": np.zeros((8, 1), np.uint8), "a.weight.absmax": SCALE}, "bitsand"),
    "bitsandbytes int8": ({"a.weight": Raw("I8", (1,), b"1"), "a.SCB": SCALE}, "bitsandbytes"),
    "gptq": ({"a.qweight": Raw("I32", (1,), b"1234"), "a.g_idx": SCALE}, "gptq or awq"),
    "hqq": ({"a.W_q": np.zeros((2, 2), np.uint8)}, "hqq"),
    "compressed": ({"a.weight_packed": Raw("I32", (1,), b"1234")}, "compressed-tensors"),
    "mxfp4": (
        {"e.down_proj_blocks": np.zeros(2, np.uint8), "e.down_proj_scales": np.zeros(2, np.uint8)},
        "mxfp4",
    ),
    "nvfp4": ({"a.weight": np.zeros(2, np.uint8), "a.weight_scale_2": SCALE}, "nvfp4"),
    "int8": ({"a.weight": Raw("I8", (1,), b"1"), "a.weight_scale": SCALE}, "scaled integers"),
}


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.parametrize("case", PACKED)
def test_other_methods_are_told_by_their_tensors(tmp_path: Path, case: str, dtype: str) -> None:
    tensors, method = PACKED[case]
    with pytest.raises(FormatError, match=rf"quantised \('{method}.*dequantize\(\)"):
        _merge(tmp_path, base_tensors(BF16) | tensors, dtype=dtype)


METHODS = ["bitsandbytes", "gptq", "awq", "hqq", "mxfp4", "quanto", "aqlm", "eetq", "torchao"]


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_told_by_the_configuration(tmp_path: Path, method: str) -> None:
    config = {"quantization_config": {"quant_method": method}}
    with pytest.raises(FormatError, match=rf"quantised \('{method}'\).*full-precision checkpoint"):
        _merge(tmp_path, base_tensors(BF16), config=config, dtype="bfloat16")
