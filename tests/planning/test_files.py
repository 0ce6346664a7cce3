"""The files beside the weights: the complete set of a merged folder, and where each came from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from boneconv.merging import merge
from boneconv.planning import plan_merge
from tests.builders import make_adapter, make_base, snapshot

SIDE = {
    "tokenizer.json": '{"base": 1}',
    "vocab.json": "base",
    "generation_config.json": "{}",
    "modeling_x.py": "code",
    "1_Pooling/config.json": "{}",
    "README.md": "---\nlicense: mit\n---\nThe base's own card.\n",
}
WEIGHTS = ["model.safetensors", "boneconv.json"]


def _merge(tmp_path: Path, **options: Any) -> dict[str, bytes]:
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    assert result.out == tmp_path / "out"
    return snapshot(tmp_path / "out")


def test_all_side_files_are_copied_and_the_card_is_new(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", files=SIDE)
    make_adapter(tmp_path / "adapter", files={"README.md": "not this", "notes.txt": "not this"})
    before = snapshot(base)
    found = _merge(tmp_path)
    assert set(found) == {*SIDE, *WEIGHTS}
    for name in set(SIDE) - {"README.md"}:
        assert found[name] == SIDE[name].encode(), name
    assert found["README.md"].startswith(b"---\nlicense: mit\n")
    assert b"The base's own card" not in found["README.md"]
    assert snapshot(base) == before


def test_no_card(tmp_path: Path) -> None:
    make_base(tmp_path / "base", files=SIDE)
    make_adapter(tmp_path / "adapter")
    assert _merge(tmp_path, card=False)["README.md"] == SIDE["README.md"].encode()


def test_no_card_where_the_base_has_none(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter")
    assert set(_merge(tmp_path, card=False)) == set(WEIGHTS)


def test_the_adapter_s_tokenizer_and_template_win(tmp_path: Path) -> None:
    make_base(tmp_path / "base", files=SIDE)
    own = {
        "tokenizer.json": '{"adapter": 1}',
        "added_tokens.json": "{}",
        "chat_template.jinja": "adapter",
        "additional_chat_templates/tool.jinja": "tool",
    }
    make_adapter(tmp_path / "adapter", files=own)
    found = _merge(tmp_path)
    assert set(found) == {*SIDE, *own, *WEIGHTS}
    assert all(found[name] == text.encode() for name, text in own.items())
    assert found["vocab.json"] == b"base"


def test_a_later_adapter_s_tokenizer_wins_over_an_earlier_one_s(tmp_path: Path) -> None:
    make_base(tmp_path / "base", files=SIDE)
    make_adapter(tmp_path / "adapter", files={"tokenizer.json": "first", "vocab.json": "first"})
    make_adapter(tmp_path / "second", files={"tokenizer.json": "second"})
    found = _merge(tmp_path, more=[tmp_path / "second"])
    assert (found["tokenizer.json"], found["vocab.json"]) == (b"second", b"first")


def test_links_of_the_hub_s_cache_are_followed(tmp_path: Path) -> None:
    real = make_base(tmp_path / "blobs", shards=2, files=SIDE)
    base = tmp_path / "snapshots" / "0123"
    for path in [p for p in real.rglob("*") if p.is_file()]:
        link = base / path.relative_to(real)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(path, link.parent))
    (tmp_path / "base").symlink_to(base)
    make_adapter(tmp_path / "adapter")
    found = _merge(tmp_path)
    assert all(found[name] == SIDE[name].encode() for name in set(SIDE) - {"README.md"})
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


STALE = [
    "pytorch_model.bin",
    "tf_model.h5",
    "model.gguf",
    "old.safetensors",
    "onnx/model.onnx",
    "onnx/config.json",
    "original/consolidated.00.pth",
    "original/params.json",
    "adapter_config.json",
]


def test_other_copies_of_the_weights_are_left_out_and_listed(tmp_path: Path) -> None:
    make_base(tmp_path / "base", files=dict.fromkeys(STALE, "stale"))
    make_adapter(tmp_path / "adapter")
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert set(snapshot(tmp_path / "out")) == {*WEIGHTS, "README.md"}
    assert set(result.left_out) == set(STALE)
    record = json.loads((tmp_path / "out" / "boneconv.json").read_text())
    assert set(record["left_out"]) == set(STALE)
    assert any(note.startswith("left out: ") for note in result.notes)


def test_the_index_is_copied_as_it_is(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards=3)
    make_adapter(tmp_path / "adapter")
    name = "model.safetensors.index.json"
    assert _merge(tmp_path)[name] == (base / name).read_bytes()


def test_new_shards_leave_nothing_of_the_old_ones(tmp_path: Path) -> None:
    make_base(tmp_path / "base", shards=3)
    make_adapter(tmp_path / "adapter")
    found = _merge(tmp_path, max_shard_size="2kB")
    index = json.loads(found["model.safetensors.index.json"])
    assert set(found) - {"README.md", "boneconv.json", "model.safetensors.index.json"} == set(
        index["weight_map"].values()
    )
    assert not any("of-00003" in name for name in found)


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    make_base(tmp_path / "base", shards=3)
    make_adapter(tmp_path / "adapter")
    assert set(_merge(tmp_path, max_shard_size="1GB")) == {*WEIGHTS, "README.md"}


def test_several_shards_need_one(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter")
    assert "model.safetensors.index.json" in _merge(tmp_path, max_shard_size="2kB")


CONFIG = {"torch_dtype": "bfloat16", "hidden_size": 12}


@pytest.mark.parametrize(("dtype", "says"), [("keep", "bfloat16"), ("float32", "float32")])
def test_the_config_says_the_dtype(tmp_path: Path, dtype: str, says: str) -> None:
    base = make_base(tmp_path / "base", config=CONFIG)
    make_adapter(tmp_path / "adapter")
    found = _merge(tmp_path, dtype=dtype)
    assert json.loads(found["config.json"]) == CONFIG | {"torch_dtype": says}
    if dtype == "keep":
        assert found["config.json"] == (base / "config.json").read_bytes()


def test_a_merged_model_can_be_merged_again(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter")
    _merge(tmp_path)
    plan = plan_merge(tmp_path / "out", tmp_path / "adapter")
    assert "boneconv.json" not in map(str, plan.plan.copies)
    again = merge(tmp_path / "out", tmp_path / "adapter", tmp_path / "again")
    assert set(snapshot(again.out)) == {*WEIGHTS, "README.md"}


def test_a_file_becomes_a_file_with_its_record_beside_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", files=SIDE)
    make_adapter(tmp_path / "adapter")
    (tmp_path / "new").mkdir()
    result = merge(
        base / "model.safetensors", tmp_path / "adapter", tmp_path / "new" / "out.safetensors"
    )
    assert set(snapshot(tmp_path / "new")) == {"out.safetensors", "out.safetensors.boneconv.json"}
    assert result.record == tmp_path / "new" / "out.safetensors.boneconv.json"
    folder = merge(base, tmp_path / "adapter", tmp_path / "folder").out
    assert (folder / "model.safetensors").read_bytes() == result.out.read_bytes()


def test_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    """Names on disk are bytes; one that is no UTF-8 must not stop a merge in its last step."""
    base = make_base(tmp_path / "base")
    try:
        (base / os.fsdecode(b"caf\xe9.bin")).write_bytes(b"x")
        (base / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes no such names")
    make_adapter(tmp_path / "adapter")
    assert os.fsdecode(b"caf\xe9.txt") in _merge(tmp_path)


def test_an_adapter_beside_its_base_is_no_part_of_the_output(tmp_path: Path) -> None:
    """Weights and adapter in one folder, as training scripts leave them."""
    base = make_base(tmp_path / "base")
    make_adapter(base)
    found = merge(base, base, tmp_path / "out")
    assert set(snapshot(found.out)) == {*WEIGHTS, "README.md"}
    assert set(found.left_out) == {"adapter_config.json", "adapter_model.safetensors"}
