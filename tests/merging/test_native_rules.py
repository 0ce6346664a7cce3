"""Native adapters in a merge: the fingerprint, strengths, stacks, and rules that a merge checks."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import boneconv
from boneconv.cli import run
from boneconv.config import Axis, Variant
from boneconv.errors import (
    BaseMismatchError,
    NameMatchError,
    NonFiniteError,
    ShapeError,
    UsageError,
)
from boneconv.formats import native
from boneconv.formats.native import Metadata, Module, NativeAdapter, write_native
from boneconv.kernels.exact import round_fraction
from tests.builders import (
    BF16,
    F32,
    Array,
    block_for,
    grid,
    make_adapter,
    make_base,
    merged,
    pack,
    same_bits,
    snapshot,
    unpack,
)
from tests.formats.native_cases import small, tensors_of

WEIGHTS = {f"{name}.weight": weight for name, weight in small().weights.items()}


def base_file(tmp_path: Path, **changes: Array) -> Path:
    path = tmp_path / "base.safetensors"
    path.write_bytes(pack(WEIGHTS | changes))
    return path


def written(native: NativeAdapter, path: Path) -> Path:
    write_native(native, path)
    return path


def other_k() -> dict[str, Array]:
    weight = WEIGHTS["k.weight"].copy()
    weight[0, 0] += 1
    return {"k.weight": weight}


# --- the fingerprint ----------------------------------------------------------------------------


def test_the_right_base_is_merged(tmp_path: Path) -> None:
    adapter = written(small(marked=True).native, tmp_path / "a.safetensors")
    result = boneconv.merge(base_file(tmp_path), adapter, tmp_path / "out.safetensors")
    assert result.notes == ()
    assert "fingerprint_ignored" not in json.loads(result.record.read_text())


def test_another_base_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    adapter = written(small(marked=True).native, tmp_path / "a.safetensors")
    base = base_file(tmp_path, **other_k())
    before = snapshot(tmp_path)
    with pytest.raises(BaseMismatchError) as caught:
        boneconv.merge(base, adapter, tmp_path / "out.safetensors")
    text = str(caught.value)
    assert f"{adapter}: R30: 1 of 2 weights" in text
    assert "made for: k.weight" in text
    assert "--allow-base-mismatch" in text
    assert snapshot(tmp_path) == before


def test_another_base_at_the_users_request(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = written(small(marked=True).native, tmp_path / "a.safetensors")
    base, out = base_file(tmp_path, **other_k()), tmp_path / "out.safetensors"
    command = ["merge", str(base), str(adapter), str(out)]
    assert run(command) == 2
    assert "R30: " in capfd.readouterr().err
    assert run([*command, "--allow-base-mismatch"]) == 0
    assert "1 of 2 weights are not those of the base" in capfd.readouterr().err
    record = json.loads((tmp_path / "out.safetensors.boneconv.json").read_text())
    assert record["fingerprint_ignored"] is True
    block = small().native.block("k").read()
    assert same_bits(unpack(out)["k.weight"], merged(other_k()["k.weight"], block, "bone"))


def test_a_cast_base_is_another_base(tmp_path: Path) -> None:
    adapter = written(small(marked=True).native, tmp_path / "a.safetensors")
    cast = {name: weight.astype(BF16) for name, weight in WEIGHTS.items()}
    with pytest.raises(BaseMismatchError, match=r"k\.weight, layers\.0\.q\.weight"):
        boneconv.merge(base_file(tmp_path, **cast), adapter, tmp_path / "out.safetensors")


def test_the_output_dtype_does_not_matter_to_the_fingerprint(tmp_path: Path) -> None:
    adapter = written(small(marked=True).native, tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    boneconv.merge(base_file(tmp_path), adapter, out, dtype="bfloat16", scale=0.5)
    assert unpack(out)["k.weight"].dtype == BF16


def test_every_adapter_of_a_stack_is_held_against_the_base(tmp_path: Path) -> None:
    first = written(small().native, tmp_path / "first.safetensors")
    marked = written(small(marked=True).native, tmp_path / "second.safetensors")
    base = base_file(tmp_path)
    boneconv.merge(base, first, tmp_path / "out.safetensors", more=[marked, marked])
    base = base_file(tmp_path, **other_k())
    with pytest.raises(BaseMismatchError, match=r"second.safetensors: R30"):
        boneconv.merge(base, first, tmp_path / "b.safetensors", more=[marked])


def test_a_replaced_weight_is_still_held_against_the_base(tmp_path: Path) -> None:
    """The second adapter acts on what the first put in place; its fingerprint is the base's."""
    new = grid((4, 6), F32, 30)
    metadata = Metadata(Variant.BONE, {"layers.0.q": Module(2)}, replaced={"k": ("weight",)})
    arrays = {"layers.0.q.bone_block": grid((2, 4)), "k.weight": new}
    first = written(NativeAdapter(metadata, tensors_of(arrays)), tmp_path / "a.safetensors")
    marked = small(marked=True).native
    second = written(marked, tmp_path / "b.safetensors")
    out = tmp_path / "out.safetensors"
    boneconv.merge(base_file(tmp_path), first, out, more=[second])
    assert same_bits(unpack(out)["k.weight"], merged(new, marked.block("k").read(), "bone"))
    base = base_file(tmp_path, **other_k())
    with pytest.raises(BaseMismatchError, match=r"made for: k\.weight"):
        boneconv.merge(base, first, tmp_path / "c.safetensors", more=[second])


def test_sharded_bases_and_resumed_merges(tmp_path: Path) -> None:
    adapter = written(small(marked=True).native, tmp_path / "a.safetensors")
    base = make_base(tmp_path / "base", WEIGHTS, shards=2)
    boneconv.merge(base, adapter, tmp_path / "out", max_shard_size="100B")
    wrong = make_base(tmp_path / "wrong", WEIGHTS | other_k(), shards=2)
    with pytest.raises(BaseMismatchError):
        boneconv.merge(wrong, adapter, tmp_path / "out2")
    assert not list(tmp_path.glob("out2*"))


# --- replaced tensors ---------------------------------------------------------------------------


def headed(name: str, new: Array, **fields: Any) -> NativeAdapter:
    module, _, leaf = name.rpartition(".")
    metadata = Metadata(Variant.BONE, {"k": Module(2)}, replaced={module: (leaf,)}, **fields)
    arrays = {"k.bone_block": small().native.block("k").read(), name: new}
    return NativeAdapter(metadata, tensors_of(arrays))


def test_a_later_tensor_wins(tmp_path: Path) -> None:
    first = written(small().native, tmp_path / "a.safetensors")
    new = grid((4, 6), F32, 31)
    metadata = Metadata(Variant.BONE, {"k": Module(2)}, replaced={"layers.0.q": ("weight",)})
    arrays = {"k.bone_block": grid((2, 4)), "layers.0.q.weight": new}
    second = written(NativeAdapter(metadata, tensors_of(arrays)), tmp_path / "b.safetensors")
    third = written(
        replace(
            NativeAdapter(metadata, tensors_of(arrays | {"layers.0.q.weight": new + F32.type(1)}))
        ),
        tmp_path / "c.safetensors",
    )
    out = tmp_path / "out.safetensors"
    boneconv.merge(base_file(tmp_path), first, out, more=[third, second])
    assert same_bits(unpack(out)["layers.0.q.weight"], new)


def test_a_weight_whose_shape_changed_cannot_be_adapted(tmp_path: Path) -> None:
    new = grid((8, 6), F32, 32)
    first = written(headed("layers.0.q.weight", new, vocab_size=8), tmp_path / "a.safetensors")
    metadata = Metadata(Variant.MINI, {"layers.0.q": Module(2, 2)})
    arrays = {"layers.0.q.bone_block": grid((2, 2))}
    second = written(NativeAdapter(metadata, tensors_of(arrays)), tmp_path / "b.safetensors")
    with pytest.raises(ShapeError, match="earlier adapter changed the shape"):
        boneconv.merge(base_file(tmp_path), first, tmp_path / "o.safetensors", more=[second])


def test_added_tensors_keep_their_dtype_and_name(tmp_path: Path) -> None:
    new = grid((3, 4), BF16)
    adapter = written(headed("score.weight", new, added=("score",)), tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    boneconv.merge(base_file(tmp_path), adapter, out)
    assert same_bits(unpack(out)["score.weight"], new)
    assert list(unpack(out))[-1] == "score.weight"


def test_what_is_not_announced_as_added_is_not_added(tmp_path: Path) -> None:
    adapter = written(headed("score.weight", grid((3, 4))), tmp_path / "a.safetensors")
    with pytest.raises(NameMatchError, match=r"R28: 'score\.weight'"):
        boneconv.merge(base_file(tmp_path), adapter, tmp_path / "out.safetensors")
    inner = headed("deep.score.weight", grid((3, 4)))
    metadata = replace(
        inner.metadata,
        replaced={"deep.score": ("weight",), "score": ("weight",)},
        added=("score",),
    )
    tensors = {**inner.tensors, **tensors_of({"score.weight": grid((3, 4))})}
    path = written(NativeAdapter(metadata, tensors), tmp_path / "b.safetensors")
    with pytest.raises(NameMatchError, match=r"R28: 'deep\.score\.weight'"):
        boneconv.merge(base_file(tmp_path), path, tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (np.arange(4, dtype=np.int64), grid((4,))),
        (grid((4,)), np.arange(4, dtype=np.int64)),
    ],
)
def test_integers_and_floats_do_not_replace_each_other(
    new: Array, old: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    native = headed("n.count", grid((4,)))
    arrays = {name: tensor.read() for name, tensor in native.tensors.items()}
    arrays["base_model.model.n.count"] = new
    path.write_bytes(pack(arrays, {"bone_adapter": native.metadata.encode()}))
    with pytest.raises(ShapeError, match=r"R29: 'n\.count' replaces a tensor of another kind"):
        boneconv.merge(base_file(tmp_path, **{"n.count": old}), path, tmp_path / "o.safetensors")


def test_integers_replace_integers_of_any_width(tmp_path: Path) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    native = headed("n.count", grid((4,)))
    arrays = {name: tensor.read() for name, tensor in native.tensors.items()}
    arrays["base_model.model.n.count"] = np.arange(4, dtype=np.int64)
    path.write_bytes(pack(arrays, {"bone_adapter": native.metadata.encode()}))
    base = base_file(tmp_path, **{"n.count": np.zeros(4, np.uint8)})
    boneconv.merge(base, path, out, dtype="bfloat16")
    assert same_bits(unpack(out)["n.count"], np.arange(4, dtype=np.int64))


# --- strength -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [Variant.BONE, Variant.BAT])
def test_scale_times_strength_is_exact(variant: Variant, tmp_path: Path) -> None:
    """The product is 1 - 2^-60, and decides a tie: rounded to binary64 it would be 1."""
    scale, strength = 1 + 2.0**-30, 1 - 2.0**-30
    weight = np.array([[1 + 2.0**-23]], F32)
    if variant is Variant.BONE:
        block = np.array([[2.0**-24]], F32)
    else:  # U[0][0] = W[0][1] B[1][0]
        weight = np.array([[1 + 2.0**-23, 1.0], [0.0, 3.0]], F32)
        block = np.array([[[0.0, 0.0], [2.0**-24, 0.0]]], F32)
    out = tmp_path / "out.safetensors"
    axis = Axis.OUT if variant is Variant.BAT else None
    rank = block.shape[-1] if variant is Variant.BAT else 1
    metadata = Metadata(variant, {"q": Module(rank)}, axis=axis, scale=scale)
    arrays = {"q.bone_block": block}
    adapter = written(NativeAdapter(metadata, tensors_of(arrays)), tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(pack({"q.weight": weight}))
    boneconv.merge(tmp_path / "b.safetensors", adapter, out, scale=strength)
    factor = Fraction(scale) * Fraction(strength)
    assert float(factor) == 1.0 != factor
    exact = [[Fraction(float(x)) for x in row] for row in weight]
    if variant is Variant.BONE:
        exact[0][0] += factor * Fraction(1, 2**24)
    else:
        b = [[Fraction(float(x)) for x in row] for row in block[0]]
        exact = [
            [
                exact[i][j] + factor * (b[i][j] + sum(exact[i][k] * b[k][j] for k in range(2)))
                for j in range(2)
            ]
            for i in range(2)
        ]
    expected = np.array([[round_fraction(x, F32) for x in row] for row in exact], F32)
    assert same_bits(unpack(out)["q.weight"], expected)
    assert expected[0, 0] == weight[0, 0] < weight[0, 0] + F32.type(2.0**-24)


def test_a_product_that_no_two_numbers_hold(tmp_path: Path) -> None:
    adapter = written(small(scale=0.1).native, tmp_path / "a.safetensors")
    for strength, text in ((1e-310, "too small"),):
        with pytest.raises(UsageError, match=text):
            boneconv.merge(base_file(tmp_path), adapter, tmp_path / "o.safetensors", scale=strength)
    big = written(small(scale=2**52).native, tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match="too large"):
        boneconv.merge(base_file(tmp_path), big, tmp_path / "o.safetensors", scale=1e300)


# --- numbers ------------------------------------------------------------------------------------


def test_numbers_of_the_adapter_and_of_the_base(tmp_path: Path) -> None:
    native = small().native
    arrays = {name: tensor.read().copy() for name, tensor in native.tensors.items()}
    arrays["base_model.model.k.bone_block"][0, 0] = np.inf
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack(arrays, {"bone_adapter": native.metadata.encode()}))
    with pytest.raises(NonFiniteError, match=rf"{path.name}: R23: .*k\.bone_block"):
        boneconv.merge(base_file(tmp_path), path, tmp_path / "o.safetensors")
    good = written(native, tmp_path / "b.safetensors")
    weight = WEIGHTS["k.weight"].copy()
    weight[1, 1] = np.nan
    base = base_file(tmp_path, **{"k.weight": weight})
    with pytest.raises(NonFiniteError, match=r"R31: 'k\.weight'"):
        boneconv.merge(base, good, tmp_path / "o.safetensors")


def test_other_formats_have_no_numbers_of_rules(tmp_path: Path) -> None:
    blocks = {"k": block_for("bone", (4, 6))}
    folder = make_adapter(tmp_path / "a", blocks=blocks)
    weight = WEIGHTS["k.weight"].copy()
    weight[1, 1] = np.nan
    with pytest.raises(NonFiniteError) as caught:
        boneconv.merge(
            base_file(tmp_path, **{"k.weight": weight}), folder, tmp_path / "o.safetensors"
        )
    assert "R31" not in str(caught.value)


def test_the_table_of_names_is_complete() -> None:
    assert all(hasattr(native, name) for name in native.__all__)
