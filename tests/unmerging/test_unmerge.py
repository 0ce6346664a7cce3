"""Unmerging without a delta file: what comes back, what is refused, what is recorded."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import boneconv
from boneconv.errors import (
    BoneconvError,
    FormatError,
    InputError,
    NameMatchError,
    OutputExistsError,
    UsageError,
)
from tests.builders import (
    BF16,
    EMBEDDING,
    F32,
    HIDDEN,
    VOCABULARY,
    Q,
    base_tensors,
    blocks_for_all,
    grid,
    make_adapter,
    make_base,
    module,
    pack,
    snapshot,
    unpack,
    unpack_folder,
)
from tests.unmerging.cases import RECORD, cases

WEIGHT = f"{module(0, Q)}.weight"


def _merge(folder: Path, variant: str = "bone", **options: Any) -> Path:
    """A base in `folder`, an adapter, and their merge."""
    make_base(folder / "base", files={"note.txt": "mine"})
    adapter = make_adapter(folder / "adapter", variant)
    boneconv.merge(folder / "base", adapter, folder / "merged", **options)
    return folder


def _unmerge(folder: Path, *adapters: str, **options: Any) -> boneconv.UnmergeResult:
    first, *more = [folder / name for name in adapters or ("adapter",)]
    return boneconv.unmerge(folder / "merged", first, folder / "back", more=more, **options)


def _refused(folder: Path, error: type[BoneconvError], text: str, *adapters: str) -> None:
    with pytest.raises(error, match=text):
        _unmerge(folder, *adapters)
    assert not (folder / "back").exists()
    assert not (folder / "back.partial").exists()


# --- what comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["bone", "bat", "mini"])
def test_small_numbers_come_back_exactly(tmp_path: Path, variant: str) -> None:
    """All values are small multiples of 1/16, and so a float32 merge loses nothing."""
    base = make_base(tmp_path / "base", base_tensors(F32), shards=2, files={"note.txt": "mine"})
    blocks = {name: block / 16 for name, block in blocks_for_all(variant).items()}
    adapter = make_adapter(tmp_path / "adapter", variant, blocks=blocks)
    boneconv.merge(base, adapter, tmp_path / "merged", card=False)
    result = _unmerge(tmp_path)
    found = snapshot(tmp_path / "back")
    record = json.loads(found.pop(RECORD))
    if variant != "bat":
        assert result.exact is True
        assert found == snapshot(base)
    else:
        for name, tensor in unpack_folder(base).items():
            bound = next((e.bound for e in result.restored if e.name == name), 0.0)
            assert np.abs(unpack_folder(tmp_path / "back")[name] - tensor).max() <= bound < 1e-4
    assert record["workflow"] == "unmerge"
    assert record["delta"] is None
    assert record["tensors"].keys() == unpack_folder(base).keys()
    assert record["tensors"][WEIGHT]["bound"] == result.restored[0].bound
    assert result.counts == {"restored": 6, "copied": 4, "stored": 0}


@given(cases())
@settings(max_examples=25)
def test_every_weight_comes_back_within_its_bound(case: Any) -> None:
    tensors, drawn, options = case
    options |= {"dtype": "keep"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "base", tensors)
        adapters = [
            make_adapter(folder / f"adapter-{i}", variant, rank=rank, blocks=blocks)
            for i, (variant, rank, blocks) in enumerate(drawn)
        ]
        boneconv.merge(base, adapters[0], folder / "merged", more=adapters[1:], **options)
        try:
            result = _unmerge(folder, *(path.name for path in adapters), workers=1)
        except InputError:
            return  # a singular block: such draws have tests of their own
        before, after = unpack_folder(base), unpack_folder(folder / "back")
        assert before.keys() == after.keys()
        bounds = {each.name: each.bound for each in result.restored}
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype
            if key in bounds:
                error = np.abs(tensor.astype(np.longdouble) - after[key].astype(np.longdouble))
                assert error.max() <= bounds[key]
            else:
                assert tensor.tobytes() == after[key].tobytes()
        exact = [each.exact for each in result.restored]
        assert exact == [
            before[e.name].tobytes() == after[e.name].tobytes() for e in result.restored
        ]
        assert result.exact == all(exact)


def test_the_condition_number_of_the_worst_block_is_reported(tmp_path: Path) -> None:
    blocks = blocks_for_all("bat")
    _ = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", "bat", blocks=blocks)
    boneconv.merge(tmp_path / "base", adapter, tmp_path / "merged")
    result = _unmerge(tmp_path)
    for each in result.restored:
        block = blocks[each.name.removesuffix(".weight")].astype(np.float64)
        expected = max(np.linalg.cond(np.eye(4) + one, 1) for one in block)
        assert each.condition == pytest.approx(expected)
    assert result.worst_condition == max(each.condition or 0 for each in result.restored)
    assert result.worst_bound == max(each.bound for each in result.restored)


def test_several_adapters_are_undone_in_reverse(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", base_tensors(F32))
    paths = [make_adapter(tmp_path / name, name) for name in ("bat", "bone")]
    boneconv.merge(base, paths[0], tmp_path / "merged", more=[paths[1]], scale=0.5)
    result = _unmerge(tmp_path, "bat", "bone")
    before, after = unpack_folder(base), unpack_folder(tmp_path / "back")
    assert all(np.abs(before[e.name] - after[e.name]).max() <= e.bound for e in result.restored)
    (tmp_path / "second").mkdir()
    for adapters, text in (
        (("bone", "bat"), "in the order of the merge"),
        (("bat",), "expected 2"),
    ):
        with pytest.raises(InputError, match=text):
            boneconv.unmerge(
                tmp_path / "merged",
                tmp_path / adapters[0],
                tmp_path / "second" / "back",
                more=[tmp_path / name for name in adapters[1:]],
            )


def test_a_file_comes_back_as_a_file(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", base_tensors(F32)) / "model.safetensors"
    adapter = make_adapter(tmp_path / "adapter")
    boneconv.merge(base, adapter, tmp_path / "merged.safetensors")
    result = boneconv.unmerge(tmp_path / "merged.safetensors", adapter, tmp_path / "b.safetensors")
    assert result.exact
    assert (tmp_path / "b.safetensors").read_bytes() == base.read_bytes()
    with pytest.raises(UsageError, match="a file is unmerged into a file"):
        boneconv.unmerge(tmp_path / "merged.safetensors", adapter, tmp_path / "b")


def test_the_card_of_the_merge_is_left_out_and_the_base_s_own_is_kept(tmp_path: Path) -> None:
    folder = _merge(tmp_path)
    result = _unmerge(folder)
    assert result.notes == ("README.md is left out: the merge wrote it",)
    assert set(snapshot(folder / "back")) == {"model.safetensors", "note.txt", RECORD}
    (tmp_path / "b").mkdir()
    base = make_base(tmp_path / "b" / "base", files={"README.md": "# Base\n"})
    boneconv.merge(base, folder / "adapter", tmp_path / "b" / "merged", card=False)
    boneconv.unmerge(tmp_path / "b" / "merged", folder / "adapter", tmp_path / "b" / "back")
    assert (tmp_path / "b" / "back" / "README.md").read_text() == "# Base\n"


def test_the_output_is_the_same_for_every_number_of_workers(tmp_path: Path) -> None:
    folder = _merge(tmp_path, "bat")
    for workers in (1, 3):
        boneconv.unmerge(
            folder / "merged", folder / "adapter", folder / f"back-{workers}", workers=workers
        )
    assert snapshot(folder / "back-1") == snapshot(folder / "back-3")


def test_an_interrupted_unmerge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", shards=3)
    adapter = make_adapter(tmp_path / "adapter", "bat")
    boneconv.merge(base, adapter, tmp_path / "merged")
    whole = boneconv.unmerge(tmp_path / "merged", adapter, tmp_path / "whole", workers=1)
    from boneconv.unmerging import outcome

    def interrupted(**found: Any) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outcome, "encode_record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _unmerge(tmp_path, workers=1)
    assert (tmp_path / "back.partial").exists()
    with monkeypatch.context() as patch:
        patch.setattr("boneconv.engine.compute.do_segment", None)  # nothing is left to compute
        patch.setattr("boneconv.engine.station.do_segment", None)
        result = _unmerge(tmp_path, workers=1)
    assert result.restored == whole.restored
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "whole")


# --- without a record ---------------------------------------------------------------------------


def test_without_a_record_the_scale_is_given(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", base_tensors(F32))
    adapter = make_adapter(tmp_path / "adapter")
    boneconv.merge(base, adapter, tmp_path / "merged", scale=0.5)
    with pytest.raises(UsageError, match="the merge had another scale"):
        _unmerge(tmp_path, scale=0.25)
    (tmp_path / "merged" / RECORD).unlink()
    result = _unmerge(tmp_path, scale=0.5)
    assert result.exact is None
    assert "taken on trust" in result.notes[0]
    before, after = unpack_folder(base), unpack_folder(tmp_path / "back")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_without_a_record_saved_tensors_are_lost(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    saved = {EMBEDDING: grid((VOCABULARY, HIDDEN), F32, 5)}
    adapter = make_adapter(tmp_path / "adapter", saved=saved)
    boneconv.merge(tmp_path / "base", adapter, tmp_path / "merged")
    (tmp_path / "merged" / RECORD).unlink()
    _refused(tmp_path, InputError, "lost: replaced: model.embed_tokens.weight")


def test_a_component_of_a_pipeline_has_its_part_of_the_record(tmp_path: Path) -> None:
    parts = {name: ["transformers", "Model"] for name in ("unet", "text_encoder")}
    for name in parts:
        make_base(tmp_path / "pipeline" / name)
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(parts))
    adapter = make_adapter(tmp_path / "adapter", "bat")
    merged, back = tmp_path / "merged", tmp_path / "back"
    boneconv.merge(tmp_path / "pipeline", adapter, merged, component="unet", scale=0.5)
    result = boneconv.unmerge(merged / "unet", adapter, back)
    assert result.exact is not None  # its digests are known
    assert {each.name for each in result.restored} == {
        f"{name}.weight" for name in blocks_for_all("bat")
    }
    record = json.loads((back / RECORD).read_text())
    assert [each["scale"] for each in record["adapters"]] == [0.5]
    other = make_adapter(tmp_path / "other")
    with pytest.raises(InputError, match="not the adapters that were merged"):
        boneconv.unmerge(merged / "unet", other, tmp_path / "nowhere")


# --- refusals -----------------------------------------------------------------------------------


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    folder = _merge(tmp_path)
    make_adapter(folder / "other", blocks=blocks_for_all(seed=3))
    _refused(folder, InputError, "not the adapters that were merged; expected 1, by", "other")
    _refused(folder, InputError, "not the adapters that were merged", "adapter", "other")


def test_a_singular_block_is_an_error_that_names_the_module(tmp_path: Path) -> None:
    blocks = blocks_for_all("bat")
    blocks[module(1, Q)] = np.tile(-np.eye(4, dtype=np.float32), (3, 1, 1))
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", "bat", blocks=blocks)
    boneconv.merge(tmp_path / "base", adapter, tmp_path / "merged")
    name = f"{module(1, Q)}.weight".replace(".", r"\.")
    _refused(tmp_path, InputError, rf"'{name}': I \+ B is singular in its block 0.*--keep-delta")


def test_replaced_tensors_are_named(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    saved = {EMBEDDING: grid((VOCABULARY, HIDDEN), F32, 5)}
    adapter = make_adapter(tmp_path / "adapter", saved=saved)
    boneconv.merge(tmp_path / "base", adapter, tmp_path / "merged")
    _refused(tmp_path, InputError, r"lost: replaced: model.embed_tokens.weight.*--delta")


def test_cast_tensors_are_named(tmp_path: Path) -> None:
    folder = _merge(tmp_path, dtype="float32")
    _refused(folder, InputError, r"lost: cast \(--dtype float32\): model.embed_tokens.weight, mod")


def test_added_tensors_are_named(tiny_case: Any, tmp_path: Path) -> None:
    case = tiny_case("llama-lm-head")
    boneconv.merge(case.base, case.adapter, tmp_path / "merged")
    with pytest.raises(InputError, match=r"added by the adapter: lm_head\.weight"):
        boneconv.unmerge(tmp_path / "merged", case.adapter, tmp_path / "back")


def test_a_head_that_has_an_embedding_s_values_may_have_been_tied(tmp_path: Path) -> None:
    same = grid((VOCABULARY, HIDDEN), BF16)
    make_base(tmp_path / "base", {EMBEDDING: same, "lm_head.weight": same})
    blocks = {"lm_head": grid((4, VOCABULARY), F32, 1)}
    adapter = make_adapter(tmp_path / "adapter", blocks=blocks)
    boneconv.merge(tmp_path / "base", adapter, tmp_path / "merged")
    _refused(tmp_path, InputError, "maybe tied to another, and absent: lm_head.weight")


def test_a_weight_that_came_with_its_block_may_have_been_replaced(tmp_path: Path) -> None:
    make_base(tmp_path / "base", {"lm_head.weight": grid((VOCABULARY, HIDDEN), F32)})
    blocks = {"lm_head": grid((4, VOCABULARY), F32, 1)}
    saved = {"lm_head.base_layer.weight": grid((VOCABULARY, HIDDEN), F32, 9)}
    adapter = make_adapter(tmp_path / "adapter", blocks=blocks, saved=saved)
    boneconv.merge(tmp_path / "base", adapter, tmp_path / "merged")
    _refused(tmp_path, InputError, "maybe replaced before the merge: lm_head.weight")


def test_a_block_without_a_home_is_refused(tmp_path: Path) -> None:
    folder = _merge(tmp_path)
    path = folder / "merged" / "model.safetensors"
    tensors = unpack(path)
    path.write_bytes(pack({n: t for n, t in tensors.items() if n != WEIGHT}, {"format": "pt"}))
    _refused(folder, NameMatchError, "1 of its blocks have no home in the checkpoint: model.lay")


def test_a_record_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = _merge(tmp_path)
    path = folder / "merged" / "model.safetensors"
    tensors = unpack(path)
    path.write_bytes(pack(tensors | {"model.more": grid((2, 2))}, {"format": "pt"}))
    _refused(folder, FormatError, "the record is of another checkpoint: they differ in model.more")


@pytest.mark.parametrize("name", [WEIGHT, EMBEDDING])
def test_a_weight_that_changed_since_the_merge_is_refused(tmp_path: Path, name: str) -> None:
    folder = _merge(tmp_path)
    path = folder / "merged" / "model.safetensors"
    tensors = unpack(path)
    changed = tensors[name] + tensors[name].dtype.type(1)
    path.write_bytes(pack(tensors | {name: changed}, {"format": "pt"}))
    _refused(folder, FormatError, f"not the one that its record describes: {name}")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"record_version": 2}, "a record of an unknown version"),
        ({"tensors": []}, "the record is malformed"),
        ({"adapters": [{}]}, "the record is malformed"),
        ({"options": {}}, "the record is malformed"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    folder = _merge(tmp_path)
    path = folder / "merged" / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    _refused(folder, FormatError, text)


def test_what_was_unmerged_is_not_unmerged_again(tmp_path: Path) -> None:
    folder = _merge(tmp_path)
    _unmerge(folder)
    with pytest.raises(UsageError, match="this is an unmerged checkpoint"):
        boneconv.unmerge(folder / "back", folder / "adapter", folder / "again")


def test_an_output_that_exists_is_kept_unless_forced(tmp_path: Path) -> None:
    folder = _merge(tmp_path)
    (folder / "back").mkdir()
    with pytest.raises(OutputExistsError):
        _unmerge(folder)
    assert _unmerge(folder, force=True).out == folder / "back"


@pytest.mark.parametrize("place", ["merged", "merged/back", "adapter/back"])
def test_the_output_lies_in_no_input(tmp_path: Path, place: str) -> None:
    folder = _merge(tmp_path)
    with pytest.raises(UsageError, match="must not be, hold or lie in an input"):
        boneconv.unmerge(folder / "merged", folder / "adapter", folder / place, force=True)
