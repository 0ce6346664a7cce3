"""Two-sided accounts: every adapter tensor has one home, every base tensor one fate.

The bases here have no config.json: names are matched directly, without transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from boneconv.errors import (
    FormatError,
    InputError,
    NameMatchError,
    NonFiniteError,
    OutputExistsError,
    ShapeError,
    UsageError,
)
from boneconv.io.checkpoint import open_checkpoint
from boneconv.merging import merge
from boneconv.planning import plan_merge
from tests.builders import (
    BF16,
    DOWN,
    EMBEDDING,
    F16,
    F32,
    HIDDEN,
    INNER,
    LAYERS,
    RANK,
    Array,
    Q,
    Raw,
    base_tensors,
    block_for,
    blocks_for_all,
    grid,
    make_adapter,
    make_base,
    merged,
    module,
    same_bits,
    snapshot,
    unpack_folder,
)

Q0 = module(0, Q)


def _merge(base: Path, adapter: Path, **options: Any) -> dict[str, Array]:
    out = base.with_name("out")
    merge(base, adapter, out, **options)
    return unpack_folder(out)


# --- every base tensor has one fate -----------------------------------------------------------


@pytest.mark.parametrize("variant", ["bone", "bat", "mini"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_merged_tensors_are_merged_and_all_others_are_untouched(
    tmp_path: Path, variant: str, dtype: Any, shards: int
) -> None:
    tensors, blocks = base_tensors(dtype), blocks_for_all(variant)
    base = make_base(tmp_path / "base", tensors, shards=shards)
    found = _merge(base, make_adapter(tmp_path / "a", variant, blocks=blocks))
    assert set(found) == set(tensors)
    for name, old in tensors.items():
        assert isinstance(old, np.ndarray)
        block = blocks.get(name.removesuffix(".weight"))
        assert same_bits(found[name], old if block is None else merged(old, block, variant)), name


def test_the_weights_alone_change_in_the_file(tmp_path: Path) -> None:
    """The file but for the merged tensors' own bytes, header included."""
    base = make_base(tmp_path / "base")
    block = {Q0: block_for("bone", (HIDDEN, HIDDEN))}
    _merge(base, make_adapter(tmp_path / "a", blocks=block))
    old = bytearray((base / "model.safetensors").read_bytes())
    new = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    stored = open_checkpoint(base).tensors[f"{Q0}.weight"]
    region = slice(stored.offset, stored.offset + stored.nbytes)
    assert old[region] != new[region]
    old[region] = new[region] = b""
    assert old == new


def test_the_counts_add_up(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    saved = {EMBEDDING: grid((32, HIDDEN), F32, 5)}
    plan = plan_merge(base, make_adapter(tmp_path / "a", saved=saved))
    norms_and_ids = LAYERS + 1
    assert plan.counts == {
        "copy": norms_and_ids,
        "cast": 0,
        "merge": 3 * LAYERS,
        "replace": 1,
        "add": 0,
    }
    assert sum(plan.counts.values()) == len(base_tensors())


def test_saved_tensors_replace_the_base_s_in_its_own_dtype(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", base_tensors(F16))
    norm = grid((HIDDEN,), F32, 99)
    found = _merge(base, make_adapter(tmp_path / "a", saved={"model.layers.0.norm.weight": norm}))
    assert same_bits(found["model.layers.0.norm.weight"], norm.astype(F16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_casts_every_floating_tensor(tmp_path: Path, dtype: str) -> None:
    target = {"float32": F32, "bfloat16": BF16, "float16": F16}[dtype]
    tensors, blocks = base_tensors(BF16), blocks_for_all()
    base = make_base(tmp_path / "base", tensors)
    found = _merge(base, make_adapter(tmp_path / "a", blocks=blocks), dtype=dtype)
    for name, old in tensors.items():
        assert isinstance(old, np.ndarray)
        block = blocks.get(name.removesuffix(".weight"))
        if old.dtype == np.int64:
            expected = old
        elif block is None:
            expected = old.astype(target)
        else:
            expected = merged(old, block, "bone", dtype=target)
        assert same_bits(found[name], expected), name


def test_a_convolution_of_one_pixel(tmp_path: Path) -> None:
    weight, block = grid((8, HIDDEN, 1, 1), BF16), block_for("bone", (8, HIDDEN))
    base = make_base(tmp_path / "base", {"conv.weight": weight})
    found = _merge(base, make_adapter(tmp_path / "a", blocks={"conv": block}))
    assert same_bits(found["conv.weight"], merged(weight, block, "bone"))


def test_a_rank_that_does_not_divide_the_input(tmp_path: Path) -> None:
    weight, block = grid((6, 10), BF16), block_for("bone", (6, 10), rank=4)
    base = make_base(tmp_path / "base", {"m.weight": weight})
    found = _merge(base, make_adapter(tmp_path / "a", blocks={"m": block}))
    assert same_bits(found["m.weight"], merged(weight, block, "bone"))


@given(
    variant=st.sampled_from(["bone", "bat"]),
    rank=st.integers(1, 5),
    tiles=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    ragged=st.integers(0, 3),
    dtypes=st.tuples(st.sampled_from([F32, F16, BF16]), st.sampled_from([F32, F16, BF16])),
    scale=st.sampled_from([1.0, 0.5, -1.0, 2.0, 0.0]),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_rank_dtype_and_scale(
    tmp_path_factory: pytest.TempPathFactory,
    variant: str,
    rank: int,
    tiles: tuple[int, int],
    ragged: int,
    dtypes: tuple[Any, Any],
    scale: float,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows = rank * tiles[0]
    columns = rank * tiles[1] + (ragged if variant == "bone" else 0)
    weight = grid((rows, columns), dtypes[0])
    block = block_for(variant, (rows, columns), rank=rank, dtype=dtypes[1])
    base = make_base(folder / "base", {"m.weight": weight})
    adapter = make_adapter(folder / "a", variant, rank=rank, blocks={"m": block})
    found = _merge(base, adapter, scale=scale, workers=1)
    assert same_bits(found["m.weight"], merged(weight, block, variant, scale=scale))


# --- every adapter tensor has one home --------------------------------------------------------


def test_modules_that_the_base_does_not_have_are_listed(tmp_path: Path) -> None:
    blocks = blocks_for_all() | {"model.layers.9.mlp.gate": block_for("bone", (4, 4))}
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a", blocks=blocks)
    with pytest.raises(NameMatchError) as caught:
        plan_merge(base, adapter)
    text = str(caught.value)
    assert "1 of its 7 tensors have no home in the base: model.layers.9.mlp.gate.weight" in text
    assert text.startswith(str(adapter / "adapter_model.safetensors"))
    assert "Is this the base that the adapter was trained on?" in text


def test_names_are_not_matched_by_their_ends(tmp_path: Path) -> None:
    for name in ("q_proj", "layers.0.self_attn.q_proj", f"other.{Q0}", f"{Q0}x"):
        folder = tmp_path / name.replace(".", "_")
        adapter = make_adapter(folder / "a", blocks={name: block_for("bone", (HIDDEN, HIDDEN))})
        with pytest.raises(NameMatchError, match="no home"):
            plan_merge(make_base(folder / "base"), adapter)


def test_a_block_and_a_weight_for_one_module_are_both_used(tmp_path: Path) -> None:
    """PEFT saves the weight below a block where it is an output head: the block goes on top."""
    base, block = make_base(tmp_path / "base"), block_for("bone", (HIDDEN, HIDDEN))
    saved = {f"{Q0}.weight": grid((HIDDEN, HIDDEN), F32, 3)}
    found = _merge(base, make_adapter(tmp_path / "a", blocks={Q0: block}, saved=saved))
    expected = merged(saved[f"{Q0}.weight"], block, "bone", dtype=BF16)
    assert same_bits(found[f"{Q0}.weight"], expected)


def test_a_module_to_save_that_the_base_lacks_needs_to_know_its_place(tmp_path: Path) -> None:
    saved = {"score.weight": grid((3, HIDDEN))}
    adapter = make_adapter(tmp_path / "a", saved=saved, modules_to_save=["score"])
    with pytest.raises(NameMatchError, match=r"score\.weight"):
        plan_merge(make_base(tmp_path / "base"), adapter)


# --- shapes and dtypes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "block", "weight"),
    [
        ("bone", (RANK, 11), (HIDDEN, HIDDEN)),
        ("bone", (RANK, INNER), (HIDDEN, INNER)),
        ("bat", (2, RANK, RANK), (HIDDEN, HIDDEN)),
        ("bat", (5, RANK, RANK), (HIDDEN, INNER)),
        ("bat", (3, RANK, RANK), (HIDDEN, 10)),
        ("bat", (3, RANK, RANK), (13, HIDDEN)),
        ("mini", (RANK, 2), (13, HIDDEN)),
        ("bone", (RANK, HIDDEN), (HIDDEN,)),
        ("bone", (RANK, HIDDEN), (HIDDEN, 3, 3, 3)),
        ("bone", (RANK, HIDDEN), (HIDDEN, 3, 1, 3)),
    ],
)
def test_a_block_that_does_not_fit_its_weight(
    tmp_path: Path, variant: str, block: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    base = make_base(tmp_path / "base", {"m.weight": grid(weight)})
    adapter = make_adapter(tmp_path / "a", variant, blocks={"m": grid(block)})
    with pytest.raises(ShapeError) as caught:
        plan_merge(base, adapter)
    assert caught.value.path == str(base / "model.safetensors")


@pytest.mark.parametrize(
    "raw",
    [
        Raw("I8", (HIDDEN, HIDDEN), bytes(HIDDEN * HIDDEN)),
        Raw("F8_E4M3", (HIDDEN, HIDDEN), bytes(HIDDEN * HIDDEN)),
        Raw("U8", (HIDDEN, HIDDEN), bytes(HIDDEN * HIDDEN)),
    ],
    ids=lambda raw: raw.dtype,
)
def test_a_weight_that_is_no_floating_one(tmp_path: Path, raw: Raw) -> None:
    base = make_base(tmp_path / "base", {"m.weight": raw})
    blocks = {"m": block_for("bone", (HIDDEN, HIDDEN))}
    with pytest.raises(FormatError, match=r"cannot be merged into.*Is the base quantised\?"):
        plan_merge(base, make_adapter(tmp_path / "a", blocks=blocks))
    saved = {"m.weight": grid((HIDDEN, HIDDEN))}
    with pytest.raises(FormatError, match=raw.dtype):
        plan_merge(base, make_adapter(tmp_path / "b", blocks={}, saved=saved))


def test_a_saved_tensor_of_another_shape(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", saved={"model.layers.0.norm.weight": grid((13,))})
    with pytest.raises(ShapeError, match=r"does not fit the base; expected \[12\], found \[13\]"):
        plan_merge(make_base(tmp_path / "base"), adapter)


def test_a_longer_vocabulary_without_a_config_that_says_so(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", saved={EMBEDDING: grid((34, HIDDEN))})
    with pytest.raises(ShapeError, match="does not fit the base"):
        plan_merge(make_base(tmp_path / "base"), adapter)


# --- several adapters, and scale --------------------------------------------------------------


def test_adapters_are_applied_in_order(tmp_path: Path) -> None:
    weight = grid((8, 8), F32)
    one, two = block_for("bat", (8, 8), seed=1), block_for("bone", (8, 8), seed=2)
    base = make_base(tmp_path / "base", {"m.weight": weight})
    a = make_adapter(tmp_path / "a", "bat", blocks={"m": one})
    b = make_adapter(tmp_path / "b", "bone", blocks={"m": two})
    first = merge(base, a, tmp_path / "ab", more=[b]).out
    second = merge(base, b, tmp_path / "ba", more=[a]).out
    ab = merged(merged(weight, one, "bat"), two, "bone")
    ba = merged(merged(weight, two, "bone"), one, "bat")
    assert same_bits(unpack_folder(first)["m.weight"], ab)
    assert same_bits(unpack_folder(second)["m.weight"], ba)
    assert not np.array_equal(ab, ba)


def test_two_adapters_are_rounded_once(tmp_path: Path) -> None:
    """Half an ulp from each: rounded after each step, both would be lost."""
    weight = np.full((4, 4), 1.0, BF16)
    block = np.full((4, 4), 2.0**-8, F32)
    base = make_base(tmp_path / "base", {"m.weight": weight})
    a, b = (make_adapter(tmp_path / name, blocks={"m": block}) for name in "ab")
    found = _merge(base, a, more=[b])
    assert found["m.weight"].astype(F32).tolist() == np.full((4, 4), 1 + 2.0**-7).tolist()


def test_two_adapters_that_replace_one_tensor(tmp_path: Path) -> None:
    saved = {EMBEDDING: grid((32, HIDDEN))}
    a, b = (make_adapter(tmp_path / name, saved=saved) for name in "ab")
    with pytest.raises(NameMatchError, match=r"two adapters replace 'model\.embed_tokens\.weight'"):
        plan_merge(make_base(tmp_path / "base"), a, more=[b])


def test_one_adapter_replaces_what_the_other_merges_into(tmp_path: Path) -> None:
    saved = {f"{Q0}.weight": grid((HIDDEN, HIDDEN))}
    a = make_adapter(tmp_path / "a")
    b = make_adapter(tmp_path / "b", blocks={}, saved=saved)
    for first, second in ((a, b), (b, a)):
        with pytest.raises(NameMatchError, match="both merged into and replaced"):
            plan_merge(make_base(tmp_path / "base"), first, more=[second])


def test_scale_applies_to_the_update(tmp_path: Path) -> None:
    weight, block = grid((HIDDEN, INNER), BF16), block_for("bat", (HIDDEN, INNER))
    name = module(0, DOWN)
    base = make_base(tmp_path / "base", {f"{name}.weight": weight})
    found = _merge(base, make_adapter(tmp_path / "a", "bat", blocks={name: block}), scale=0.25)
    assert same_bits(found[f"{name}.weight"], merged(weight, block, "bat", scale=0.25))


def test_scale_does_not_reach_replaced_tensors_and_says_so(tmp_path: Path) -> None:
    saved = {EMBEDDING: grid((32, HIDDEN), BF16, 5)}
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", saved=saved)
    plan = plan_merge(base, adapter, scale=0.5)
    assert any("0.5" in note and EMBEDDING in note for note in plan.notes)
    assert same_bits(_merge(base, adapter, scale=0.5)[EMBEDDING], saved[EMBEDDING])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_not_finite(tmp_path: Path, scale: float) -> None:
    with pytest.raises(UsageError, match="scale is not finite"):
        plan_merge(make_base(tmp_path / "base"), make_adapter(tmp_path / "a"), scale=scale)


# --- options and places -----------------------------------------------------------------------


def test_unknown_fields_of_the_configuration_are_told(tmp_path: Path) -> None:
    plan = plan_merge(make_base(tmp_path / "base"), make_adapter(tmp_path / "a", lora_alpha=3))
    assert any("unknown configuration fields kept: lora_alpha" in note for note in plan.notes)


def test_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        plan_merge(make_base(tmp_path / "base"), make_adapter(tmp_path / "a"), dtype="int8")


@pytest.mark.parametrize("place", ["base", "base/out", "adapter", "adapter/x/out", "."])
def test_an_output_that_touches_an_input(tmp_path: Path, place: str) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    before = snapshot(tmp_path)
    with pytest.raises(InputError):
        merge(base, adapter, tmp_path / place, force=True)
    assert snapshot(tmp_path) == before


def test_an_output_that_reaches_an_input_through_a_link(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    (tmp_path / "link").symlink_to(base)
    before = snapshot(base)
    with pytest.raises(UsageError, match="must not be, hold or lie in an input"):
        merge(base, adapter, tmp_path / "link" / "out")
    assert snapshot(base) == before


def test_a_folder_does_not_become_a_file_nor_the_reverse(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    with pytest.raises(UsageError, match="a file is merged into a file"):
        merge(base, adapter, tmp_path / "out.safetensors")
    with pytest.raises(UsageError, match=r"expected a name that ends in \.safetensors"):
        merge(base / "model.safetensors", adapter, tmp_path / "out")
    with pytest.raises(UsageError, match="a file cannot be split"):
        merge(base / "model.safetensors", adapter, tmp_path / "o.safetensors", max_shard_size="1kB")


def test_force_and_a_failed_merge_keep_the_old_output(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    out = merge(base, adapter, tmp_path / "out").out
    before = snapshot(out)
    blocks = {Q0: np.full((RANK, HIDDEN), np.nan, F32)}
    bad = make_adapter(tmp_path / "bad", blocks=blocks)
    with pytest.raises(OutputExistsError):
        merge(base, bad, out)
    with pytest.raises(NonFiniteError):
        merge(base, bad, out, force=True)
    assert snapshot(out) == before
    assert json.loads(before["boneconv.json"])["record_version"] == 1
