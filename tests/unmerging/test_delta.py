"""Every byte of the base comes back with the delta file that the merge kept."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import boneconv
from boneconv.errors import BoneconvError, FormatError, InputError, OutputExistsError, UsageError
from tests.builders import (
    BF16,
    EMBEDDING,
    F16,
    F32,
    F64,
    HIDDEN,
    VOCABULARY,
    Array,
    Q,
    Raw,
    base_tensors,
    blocks_for_all,
    grid,
    make_adapter,
    make_base,
    module,
    pack,
    snapshot,
    unpack,
)
from tests.kernels.other_orders import reversed_products
from tests.unmerging.cases import RECORD, cases


def _round_trip(
    folder: Path, base: Path, adapters: list[Path], **options: Any
) -> tuple[boneconv.MergeResult, boneconv.UnmergeResult]:
    """Merge with a delta, unmerge with it."""
    first, *more = adapters
    merged = boneconv.merge(
        base, first, folder / "merged", more=more, keep_delta=folder / "delta", **options
    )
    restored = boneconv.unmerge(
        folder / "merged", first, folder / "back", more=more, delta=folder / "delta"
    )
    return merged, restored


def _same_folders(base: Path, back: Path) -> bool:
    expected, found = snapshot(base), snapshot(back)
    found.pop(RECORD)
    assert found.keys() == expected.keys()
    return found == expected


@given(cases(), st.sampled_from([1, 2]))
@settings(max_examples=40)
def test_every_byte_comes_back(case: Any, shards: int) -> None:
    tensors, drawn, options = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "base", tensors, shards=shards, files={"note.txt": "mine"})
        adapters = [
            make_adapter(folder / f"adapter-{i}", variant, rank=rank, blocks=blocks)
            for i, (variant, rank, blocks) in enumerate(drawn)
        ]
        _, result = _round_trip(folder, base, adapters, **options)
        assert _same_folders(base, folder / "back")
        assert result.exact is True
        assert all(each.exact and each.bound == 0 for each in result.restored)


# --- what a merge replaces, adds or leaves out --------------------------------------------------


def test_replaced_tensors_and_files_come_back(tmp_path: Path) -> None:
    base = make_base(
        tmp_path / "base", files={"README.md": "# Base\n", "tokenizer.json": "{}", "a/b.txt": "x"}
    )
    adapter = make_adapter(
        tmp_path / "adapter",
        saved={EMBEDDING: grid((VOCABULARY, HIDDEN), F32, 5)},
        files={"tokenizer.json": '{"mine": 1}', "chat_template.jinja": "hello"},
    )
    merged, result = _round_trip(tmp_path, base, [adapter])
    assert merged.delta == tmp_path / "delta"
    assert (tmp_path / "merged" / "chat_template.jinja").exists()
    assert _same_folders(base, tmp_path / "back")
    assert result.counts == {"restored": 6, "copied": 3, "stored": 1}
    assert result.notes == ()


def test_a_base_without_a_card_gets_none(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    _round_trip(tmp_path, base, [make_adapter(tmp_path / "adapter")])
    assert (tmp_path / "merged" / "README.md").exists()
    assert _same_folders(base, tmp_path / "back")


def test_other_copies_of_the_weights_are_not_restored(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", files={"pytorch_model.bin": "stale"})
    _, result = _round_trip(tmp_path, base, [make_adapter(tmp_path / "adapter")])
    assert result.left_out == ("pytorch_model.bin",)
    assert not (tmp_path / "back" / "pytorch_model.bin").exists()


def test_a_head_that_was_untied_is_absent_again(tiny_case: Any, tmp_path: Path) -> None:
    for name in ("llama-lm-head", "llama-embedding", "llama-resized"):
        case = tiny_case(name)
        _round_trip(tmp_path / name, case.base, [case.adapter])
        assert _same_folders(case.base, tmp_path / name / "back")


def test_a_merge_of_a_merge_is_undone_step_by_step(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    bat, bone = make_adapter(tmp_path / "bat", "bat"), make_adapter(tmp_path / "bone")
    boneconv.merge(base, bat, tmp_path / "first", keep_delta=tmp_path / "first.delta")
    _, result = _round_trip(tmp_path, tmp_path / "first", [bone])
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "first")
    assert result.record == tmp_path / "back" / RECORD
    again = tmp_path / "again"
    boneconv.unmerge(tmp_path / "back", bat, again, delta=tmp_path / "first.delta")
    assert _same_folders(base, again)


def test_a_file_is_restored_as_a_file(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base") / "model.safetensors"
    adapter = make_adapter(tmp_path / "adapter")
    out, back = tmp_path / "merged.safetensors", tmp_path / "back.safetensors"
    boneconv.merge(base, adapter, out, keep_delta=tmp_path / "delta")
    result = boneconv.unmerge(out, adapter, back, delta=tmp_path / "delta")
    assert back.read_bytes() == base.read_bytes()
    assert result.record == tmp_path / f"back.safetensors.{RECORD}"
    assert json.loads(result.record.read_text())["workflow"] == "unmerge"
    with pytest.raises(FormatError, match="another merged checkpoint"):
        shutil.copytree(tmp_path / "base", tmp_path / "folder")
        boneconv.unmerge(tmp_path / "folder", adapter, tmp_path / "x", delta=tmp_path / "delta")


def test_the_base_s_own_header_comes_back(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", metadata={"format": "pt", "by": "somebody"})
    path = base / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.dumps(json.loads(content[8 : 8 + length]), indent=1).encode() + b" " * 3
    path.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + length :])
    adapter = make_adapter(tmp_path / "adapter")
    _round_trip(tmp_path, base, [adapter], dtype="float32", max_shard_size="1kB")
    assert _same_folders(base, tmp_path / "back")


# --- hard values --------------------------------------------------------------------------------


def test_a_singular_block_hinders_nobody(tmp_path: Path) -> None:
    blocks = blocks_for_all("bat")
    blocks[module(1, Q)] = np.tile(-np.eye(4, dtype=np.float32), (3, 1, 1))
    base = make_base(tmp_path / "base")
    _, result = _round_trip(
        tmp_path, base, [make_adapter(tmp_path / "adapter", "bat", blocks=blocks)]
    )
    assert _same_folders(base, tmp_path / "back")
    conditions = {each.name: each.condition for each in result.restored}
    assert conditions.pop(f"{module(1, Q)}.weight") is None
    assert all(condition is not None for condition in conditions.values())


def test_weights_whose_prediction_overflows_come_back(tmp_path: Path) -> None:
    tensors = base_tensors(F16)
    name = f"{module(0, Q)}.weight"
    tensors[name] = np.full((HIDDEN, HIDDEN), 65504, F16)
    base, adapter = make_base(tmp_path / "base", tensors), make_adapter(tmp_path / "adapter")
    _round_trip(tmp_path, base, [adapter], dtype="bfloat16")
    assert unpack(tmp_path / "merged" / "model.safetensors")[name].max() == 65536
    assert _same_folders(base, tmp_path / "back")


def test_numbers_that_are_none_come_back_through_a_cast(tmp_path: Path) -> None:
    tensors = base_tensors(F32)
    odd = np.asarray([0x7FC00001, 0xFFA00000, 0x7F800000, 0xFF800000, 0x80000000, 1], np.uint32)
    tensors["model.odd"] = odd.view(F32)
    tensors["model.scalar"] = np.asarray(0.1, F32)
    tensors["model.empty"] = np.zeros((0, 4), F32)
    base, adapter = make_base(tmp_path / "base", tensors), make_adapter(tmp_path / "adapter")
    for dtype in ("bfloat16", "float16"):
        _round_trip(tmp_path / dtype, base, [adapter], dtype=dtype)
        assert _same_folders(base, tmp_path / dtype / "back")


def test_a_scale_that_is_a_product_is_kept_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    tensors = base_tensors(F64) | {f"{module(0, Q)}.weight": rng.standard_normal((HIDDEN, HIDDEN))}
    base, adapter = make_base(tmp_path / "base", tensors), make_adapter(tmp_path / "adapter", "bat")
    _round_trip(tmp_path, base, [adapter], scale=1 / 3)
    assert _same_folders(base, tmp_path / "back")


# --- the same on every machine ------------------------------------------------------------------


def _larger_base(folder: Path) -> Path:
    rng = np.random.default_rng(8)
    weight = (rng.standard_normal((768, 1024)) * 0.02).astype(BF16)
    return make_base(folder, base_tensors() | {f"{module(0, Q)}.weight": weight})


def _larger_adapter(folder: Path, size: float = 0.02) -> Path:
    rng = np.random.default_rng(9)
    block = (rng.standard_normal((12, 64, 64)) * size).astype(F32)
    return make_adapter(folder, "bat", rank=64, blocks={module(0, Q): block})


def test_the_delta_file_is_the_same_for_every_number_of_workers(tmp_path: Path) -> None:
    base, adapter = _larger_base(tmp_path / "base"), _larger_adapter(tmp_path / "adapter")
    for workers in (1, 3):
        boneconv.merge(
            base,
            adapter,
            tmp_path / f"merged-{workers}",
            keep_delta=tmp_path / f"{workers}.delta",
            workers=workers,
        )
        boneconv.unmerge(
            tmp_path / f"merged-{workers}",
            adapter,
            tmp_path / f"back-{workers}",
            delta=tmp_path / f"{workers}.delta",
            workers=workers,
        )
        assert _same_folders(base, tmp_path / f"back-{workers}")
    assert (tmp_path / "1.delta").read_bytes() == (tmp_path / "3.delta").read_bytes()


def test_it_is_small_where_the_update_is(tmp_path: Path) -> None:
    base, adapter = _larger_base(tmp_path / "base"), _larger_adapter(tmp_path / "adapter", 1e-3)
    boneconv.merge(base, adapter, tmp_path / "merged", keep_delta=tmp_path / "delta")
    weights = (base / "model.safetensors").stat().st_size
    assert (tmp_path / "delta").stat().st_size < 0.06 * weights


def test_a_delta_file_holds_under_another_order_of_summation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = _larger_base(tmp_path / "base"), _larger_adapter(tmp_path / "adapter")
    delta = tmp_path / "delta"
    boneconv.merge(base, adapter, tmp_path / "merged", keep_delta=delta, workers=1)
    calls = reversed_products(monkeypatch)
    boneconv.unmerge(tmp_path / "merged", adapter, tmp_path / "back", delta=delta, workers=1)
    assert calls
    assert _same_folders(base, tmp_path / "back")


# --- refusals -----------------------------------------------------------------------------------


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A folder with a base, two adapters, a merge of the first and its delta file."""
    make_base(tmp_path / "base", files={"note.txt": "mine"})
    adapter = make_adapter(tmp_path / "adapter", "bat")
    make_adapter(tmp_path / "other", "bat", blocks=blocks_for_all("bat", seed=3))
    boneconv.merge(tmp_path / "base", adapter, tmp_path / "merged", keep_delta=tmp_path / "delta")
    return tmp_path


def _refused(folder: Path, error: type[BoneconvError], text: str, adapter: str = "adapter") -> None:
    with pytest.raises(error, match=text):
        boneconv.unmerge(
            folder / "merged", folder / adapter, folder / "back", delta=folder / "delta"
        )
    assert not (folder / "back").exists()
    assert not (folder / "back.partial").exists()


def test_another_adapter_is_refused(merged: Path) -> None:
    _refused(merged, InputError, "not the adapters that were merged", "other")
    (merged / "merged" / RECORD).unlink()
    _refused(merged, InputError, "made with other adapters", "other")


def test_the_delta_file_of_another_merge_is_refused(merged: Path) -> None:
    (merged / "delta").unlink()
    tensors = base_tensors(seed=1)
    base = make_base(merged / "base-2", tensors)
    boneconv.merge(base, merged / "adapter", merged / "merged-2", keep_delta=merged / "delta")
    _refused(merged, FormatError, "made beside another merged checkpoint: they differ in")
    (merged / "merged" / RECORD).unlink()
    shutil.copy(merged / "merged-2" / "README.md", merged / "merged" / "README.md")
    _refused(merged, FormatError, "what was restored is not the base: model.embed_tokens.weight")


def test_a_weight_that_changed_since_the_merge_is_refused(merged: Path) -> None:
    path = merged / "merged" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    _refused(merged, FormatError, "what was restored is not the base")


def test_a_file_that_changed_since_the_merge_is_refused(merged: Path) -> None:
    (merged / "merged" / "note.txt").write_text("yours")
    _refused(merged, FormatError, "files of the merged folder have changed since the merge: note")


def test_every_damaged_byte_of_a_delta_file_is_noticed(merged: Path) -> None:
    """No damage restores anything but the base; most is refused, some hits unused bytes."""
    content = (merged / "delta").read_bytes()
    rng = np.random.default_rng(6)
    refused = 0
    for place in rng.choice(len(content), 40, replace=False).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        (merged / "delta").write_bytes(damaged)
        try:
            boneconv.unmerge(
                merged / "merged",
                merged / "adapter",
                merged / "back",
                delta=merged / "delta",
                workers=1,
            )
        except InputError:
            refused += 1
            assert not (merged / "back").exists()
        else:
            assert _same_folders(merged / "base", merged / "back")
            shutil.rmtree(merged / "back")
    assert refused > 20


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"format": "pt"}, "not a delta file"),
        ({"format": "boneconv-delta", "version": "2"}, "a delta file of another version"),
    ],
)
def test_what_is_no_delta_file_is_refused(
    merged: Path, metadata: dict[str, str], text: str
) -> None:
    document: dict[str, Array | Raw] = {"document": np.frombuffer(b"{}", np.uint8)}
    (merged / "delta").write_bytes(pack(document, metadata))
    _refused(merged, FormatError, text)


def test_a_delta_file_is_not_overwritten_unless_forced(merged: Path) -> None:
    again = {"keep_delta": merged / "delta", "workers": 1}
    before = (merged / "delta").read_bytes()
    with pytest.raises(OutputExistsError):
        boneconv.merge(merged / "base", merged / "adapter", merged / "again", **again)
    assert not (merged / "again").exists()
    boneconv.merge(merged / "base", merged / "adapter", merged / "again", **again, force=True)
    assert (merged / "delta").read_bytes() == before


@pytest.mark.parametrize("place", ["base/delta", "again/delta", "again"])
def test_a_delta_file_lies_neither_in_the_base_nor_in_the_output(merged: Path, place: str) -> None:
    with pytest.raises(UsageError, match="must not lie in the base or the output"):
        boneconv.merge(
            merged / "base", merged / "adapter", merged / "again", keep_delta=merged / place
        )
    assert not (merged / "again").exists()


def test_no_output_appears_where_the_delta_file_cannot_be_written(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("boneconv.delta.write._compute", full)
    with pytest.raises(BoneconvError, match="the disk is full"):
        boneconv.merge(
            merged / "base", merged / "adapter", merged / "again", keep_delta=merged / "new"
        )
    assert not (merged / "again").exists()
    assert not (merged / "new").exists()
    monkeypatch.undo()
    boneconv.merge(merged / "base", merged / "adapter", merged / "again", keep_delta=merged / "new")
    assert (merged / "new").read_bytes() == (merged / "delta").read_bytes()


def test_archives_of_torch_keep_no_delta(tmp_path: Path) -> None:
    import torch

    weight = grid((HIDDEN, HIDDEN), F32)
    torch.save({f"{module(0, Q)}.weight": torch.from_numpy(weight)}, tmp_path / "base.pth")
    blocks = {module(0, Q): blocks_for_all()[module(0, Q)]}
    adapter = make_adapter(tmp_path / "adapter", blocks=blocks)
    with pytest.raises(UsageError, match="restores safetensors files only"):
        boneconv.merge(
            tmp_path / "base.pth", adapter, tmp_path / "out.pth", keep_delta=tmp_path / "delta"
        )
    boneconv.merge(tmp_path / "base.pth", adapter, tmp_path / "out.pth")
    boneconv.unmerge(tmp_path / "out.pth", adapter, tmp_path / "back.pth")
    (back,) = torch.load(tmp_path / "back.pth", weights_only=True).values()
    assert np.array_equal(back.numpy(), weight)


def test_the_adapter_has_to_have_the_block(merged: Path) -> None:
    tensors: dict[str, Any] = unpack(merged / "delta")
    document = tensors["document"].tobytes().replace(b'"module": "model.', b'"module": "modem.')
    tensors["document"] = np.frombuffer(document, np.uint8)
    metadata = {"format": "boneconv-delta", "version": "1"}
    (merged / "delta").write_bytes(pack(tensors, metadata))
    _refused(merged, InputError, "the adapter has no block of 'modem.")
