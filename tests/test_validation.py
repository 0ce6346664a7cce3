"""`boneconv.validate`: every rule that an adapter breaks, in its own format and with its base."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import boneconv
from boneconv.errors import BoneconvError, MissingPathError, NotABoneAdapterError
from boneconv.formats import native as formats_native
from boneconv.formats.native import RULES, Metadata, Module, NativeAdapter, base, write_native
from boneconv.names import DIRECT, Resolution
from boneconv.validation import Validation, validate
from tests.builders import (
    BF16,
    F16,
    F32,
    HIDDEN,
    RANK,
    Q,
    base_tensors,
    block_for,
    blocks_for_all,
    grid,
    make_adapter,
    make_base,
    module,
    pack,
    snapshot,
)
from tests.formats.native_cases import small, tensors_of


def rules(found: Validation) -> list[str]:
    return [violation.rule for violation in found.violations]


# --- native -------------------------------------------------------------------------------------


def test_a_valid_adapter(tmp_path: Path) -> None:
    write_native(small().native, tmp_path / "a")
    before = snapshot(tmp_path)
    found = validate(tmp_path / "a")
    assert (found.path, found.format, found.violations) == (tmp_path / "a", "native", ())
    assert found.valid and found.is_adapter and not found.with_base
    assert str(found.peft) == "loads in PEFT 0.14 to 0.18"
    assert snapshot(tmp_path) == before


def test_all_violations_of_the_first_stage_that_fails(tmp_path: Path) -> None:
    metadata = small().native.metadata.to_json()
    metadata["modules"]["k"] = {"rank": 0, "bias": "no"}
    metadata["modules"]["layers.0.q"] = {"base_shape": [4]}
    metadata["axis"] = "out"  # R12, a stage that is not reached
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(pack({}, {"bone_adapter": text}))
    found = validate(folder)
    assert rules(found) == ["R10", "R11", "R11", "R11"]
    assert "'layers.0.q' has no rank" in found.violations[0].message
    assert {v.expected for v in found.violations[1:]} == {
        "true or false",
        "an integer from 1 to 999999999",
        "[out, in] or [out, in, 1, 1]",
    }
    assert all(v.path == str(folder / "adapter_model.safetensors") for v in found.violations)
    assert found.peft.versions is None
    assert str(found.peft) == "refused: it breaks R10, R11"


def test_tensors_and_config_are_one_stage(tmp_path: Path) -> None:
    write_native(small().native, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 3, "lora_alpha": 1}))
    broken = replace(small().native, tensors=tensors_of({"k.bone_block": np.full((3, 4), np.inf)}))
    arrays = {name: tensor.read() for name, tensor in broken.tensors.items()}
    text = broken.metadata.encode()
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(pack(arrays, {"bone_adapter": text}))
    found = validate(tmp_path / "a")
    assert rules(found) == ["R17", "R19", "R20", "R23", "R26", "R26"]
    assert {v.path for v in found.violations if v.rule == "R26"} == {str(config)}


def test_what_peft_does_not_load_is_explained(tmp_path: Path) -> None:
    write_native(small(scale=0.5).native, tmp_path / "a")
    assert str(validate(tmp_path / "a").peft) == "refused: it has the scale 0.5"
    write_native(small().native, tmp_path / "b.safetensors")
    assert "no adapter_config.json" in str(validate(tmp_path / "b.safetensors").peft)
    write_native(small().native, tmp_path / "c")
    path = tmp_path / "c" / "adapter_config.json"
    path.write_text('{"peft_type": "BONE_ADAPTER"}')
    assert str(validate(tmp_path / "c").peft) == "refused: its peft_type is BONE_ADAPTER"


def test_what_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_bytes(pack({"x": grid((2, 2))}))
    found = validate(tmp_path / "file.safetensors")
    assert rules(found) == ["R05"]
    assert not found.is_adapter
    with pytest.raises(MissingPathError):
        validate(tmp_path / "nothing")
    with pytest.raises(NotABoneAdapterError):
        validate(make_base(tmp_path / "base"))


# --- with a base --------------------------------------------------------------------------------


def native_on(tmp_path: Path, *, marked: bool = True, **fields: Any) -> tuple[Path, Path]:
    """An adapter and the base it was made for."""
    case = small(marked=marked, **fields)
    tensors = {f"{name}.weight": weight for name, weight in case.weights.items()}
    (tmp_path / "base.safetensors").write_bytes(pack(tensors))
    write_native(case.native, tmp_path / "a")
    return tmp_path / "a", tmp_path / "base.safetensors"


def test_the_right_base(tmp_path: Path) -> None:
    adapter, path = native_on(tmp_path)
    found = validate(adapter, base=path)
    assert found.valid and found.with_base


def test_every_difference_of_the_base_is_found(tmp_path: Path) -> None:
    adapter, path = native_on(tmp_path)
    weights = {f"{name}.weight": weight.copy() for name, weight in small().weights.items()}
    weights["k.weight"][0, 0] += 1
    weights["layers.0.q.weight"][0, 0] = np.nan
    path.write_bytes(pack(weights))
    found = validate(adapter, base=path)
    assert rules(found) == ["R30", "R31"]
    assert "2 of 2 weights" in found.violations[0].message
    assert "k.weight, layers.0.q.weight" in found.violations[0].message
    assert found.violations[1].message == "'layers.0.q.weight' holds NaN or infinity"
    assert found.peft.versions == "0.14 to 0.18"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("k.weight"), ["R28"]),
        (lambda t: t.clear() or t.update(x=grid((2, 2))), ["R28", "R28"]),
        (lambda t: t.update({"k.weight": grid((5, 6))}), ["R29"]),
        (lambda t: t.update({"k.weight": np.zeros((4, 6), np.int64)}), ["R29", "R30"]),
    ],
)
def test_a_base_that_does_not_fit(
    change: Callable[[dict[str, Any]], Any], expected: list[str], tmp_path: Path
) -> None:
    adapter, path = native_on(tmp_path)
    tensors: dict[str, Any] = {f"{n}.weight": w for n, w in small().weights.items()}
    tensors["layers.0.q.weight"] = tensors["layers.0.q.weight"] + (expected[-1] == "R30")
    change(tensors)
    path.write_bytes(pack(tensors))
    assert rules(validate(adapter, base=path)) == expected


def test_a_result_that_overflows(tmp_path: Path) -> None:
    adapter, path = native_on(tmp_path, replaced={"n": ("weight",)})
    tensors = {f"{n}.weight": w for n, w in small().weights.items()}
    path.write_bytes(pack({**tensors, "n.weight": grid((3, 4), F16)}))
    assert validate(adapter, base=path).valid
    assert rules(validate(adapter, base=path, scale=1e300)) == ["R31", "R31"]
    native = small(marked=True, replaced={"n": ("weight",)}).native
    large = tensors_of({"n.weight": np.full((3, 4), 1e6, "f4")})
    write_native(replace(native, tensors={**native.tensors, **large}), tmp_path / "b")
    found = validate(tmp_path / "b", base=path)
    assert rules(found) == ["R31"]
    assert "'n.weight': the value at (0,) is beyond the range of float16" in (
        found.violations[0].message
    )


def test_a_tied_weight_is_the_one_it_is_tied_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers is stood in for: the base is of no class that it knows."""
    adapter, path = native_on(tmp_path)
    folder = tmp_path / "base"
    tensors = {f"{n}.weight": w for n, w in small().weights.items()}
    tensors["source"] = tensors.pop("k.weight")
    make_base(folder, tensors, config={})
    assert not path.is_dir()
    monkeypatch.setattr(base, "tied_names", lambda *_, **__: {"k.weight": "source"})
    monkeypatch.setattr(base, "disk_name", lambda name, *_, **__: name)
    found = {"layers.0.q.weight": "layers.0.q.weight"}
    resolution = Resolution(found, ("k.weight",), DIRECT)
    monkeypatch.setattr(base, "resolve", lambda *_, **__: resolution)
    assert validate(adapter, base=folder).valid
    monkeypatch.setattr(base, "tied_names", lambda *_, **__: {})
    assert rules(validate(adapter, base=folder)) == ["R28"]


def test_large_weights_are_read_in_parts(tmp_path: Path) -> None:
    weight = grid((1024, 1536), BF16)
    metadata = Metadata(Variant_BAT, {"q": Module(8)}, axis=boneconv.Axis.OUT)
    native = NativeAdapter(metadata, tensors_of({"q.bone_block": grid((128, 8, 8)) / F32.type(64)}))
    write_native(native, tmp_path / "a")
    path = tmp_path / "base.safetensors"
    path.write_bytes(pack({"q.weight": weight}))
    from boneconv.formats import read_adapter
    from boneconv.io.checkpoint import open_checkpoint

    digests = formats_native.fingerprint(open_checkpoint(path), read_adapter(tmp_path / "a"))
    module = Module(8, base_shape=(1024, 1536), base_dtype="BF16", base_digest=digests["q"].digest)
    marked = replace(
        metadata,
        modules={"q": module},
        fingerprint=formats_native.metadata.root_of({"q": module}),
    )
    write_native(replace(native, metadata=marked), tmp_path / "b")
    assert validate(tmp_path / "b", base=path).valid
    weight[1000, 1500] = np.inf
    path.write_bytes(pack({"q.weight": weight}))
    assert rules(validate(tmp_path / "b", base=path)) == ["R30", "R31"]


Variant_BAT = boneconv.Variant.BAT


# --- PEFT's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "fields", "versions"),
    [
        ("bone", {}, "0.14 to 0.18"),
        ("bat", {"modules_to_save": None}, "0.14 to 0.18"),
        ("bone", {"peft_version": "0.18.1"}, "0.15 to 0.18"),
        ("mini", {}, "0.17 and later"),
        ("bone", {"peft_type": "MISS"}, "0.17 and later"),
    ],
)
def test_pefts_adapters(
    variant: str, fields: dict[str, Any], versions: str, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "a", variant, **fields)
    found = validate(folder, base=make_base(tmp_path / "base"))
    assert (found.format, found.violations) == ("peft", ())
    assert found.peft.versions == versions
    assert validate(folder / "adapter_model.safetensors").valid


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"peft_type": "LORA"}, ["R25"]),
        ({"peft_type": None}, ["R25"]),
        ({"r": -1}, ["R11"]),
        ({"init_weights": "other"}, ["R11"]),
        ({"rank": 3}, ["R20"]),
        ({"peft_type": "MISS", "blocks": {}}, ["R17"]),
        ({"blocks": {"a": np.full((4, 4), np.nan, "f4"), "b": grid((3, 4))}}, ["R20", "R23"]),
        ({"blocks": {"a": np.zeros((4, 4), np.int64)}}, ["R19"]),
    ],
)
def test_violations_of_pefts_adapters(
    fields: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    rank = fields.pop("rank", RANK)
    folder = make_adapter(tmp_path / "a", **fields)
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text()) | {"r": fields.get("r", rank)}
    config.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    found = validate(folder)
    assert sorted(set(rules(found))) == expected
    assert found.is_adapter is (expected != ["R25"])
    assert all(violation.error().exit_code == 2 for violation in found.violations)


def test_blocks_of_the_other_type(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "MISS"}))
    assert set(rules(validate(folder))) == {"R18"}


def test_a_damaged_file_and_a_damaged_config(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert rules(validate(folder)) == ["R04"]
    (folder / "adapter_config.json").write_text("{")
    assert rules(validate(folder)) == ["R24"]


def test_a_peft_adapter_and_another_base(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    tensors = base_tensors()
    tensors[f"{module(0, Q)}.weight"] = grid((HIDDEN + 1, HIDDEN), BF16)
    assert rules(validate(folder, base=make_base(tmp_path / "b", tensors))) == ["R29"]
    del tensors[f"{module(0, Q)}.weight"]
    assert rules(validate(folder, base=make_base(tmp_path / "c", tensors))) == ["R28"]


def test_a_convolution_needs_no_announcement_in_peft(tmp_path: Path) -> None:
    blocks = {"proj": block_for("bone", (HIDDEN, HIDDEN))}
    folder = make_adapter(tmp_path / "a", blocks=blocks)
    for shape, expected in (((HIDDEN, 8, 1, 1), []), ((HIDDEN, 8, 3, 3), ["R29"])):
        tensors = {"proj.weight": grid(shape, BF16)}
        path = make_base(tmp_path / f"base{len(expected)}", tensors)
        assert rules(validate(folder, base=path)) == expected


def test_a_pickled_adapter(tmp_path: Path) -> None:
    import torch

    folder = make_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingPathError):
        validate(folder)
    values = {
        f"base_model.model.{name}.bone_block": torch.from_numpy(block)
        for name, block in blocks_for_all().items()
    }
    torch.save(values, folder / "adapter_model.bin")
    assert validate(folder, base=make_base(tmp_path / "base")).valid
    next(iter(values.values()))[0, 0] = torch.inf
    torch.save(values, folder / "adapter_model.bin")
    found = validate(folder)
    assert rules(found) == ["R23"]
    assert found.violations[
        0
    ].message == "model.layers.0.self_attn.q_proj's block holds NaN or " + ("infinity")


def test_every_rule_knows_its_error() -> None:
    assert len(RULES) == 31
    assert all(issubclass(rule.error, BoneconvError) for rule in RULES.values())
    assert all(rule.title for rule in RULES.values())
