"""Bases in torch's own files: one pytorch_model.bin, or several and an index."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from boneconv.errors import FormatError, MissingPathError, NameMatchError
from boneconv.inspection import CheckpointSummary, inspect
from boneconv.io.checkpoint import open_checkpoint
from boneconv.merging import merge
from boneconv.planning import plan_merge
from boneconv.unmerging import unmerge
from boneconv.verification import verify
from tests.builders import (
    BF16,
    EMBEDDING,
    F32,
    Array,
    base_tensors,
    grid,
    make_adapter,
    make_base,
    same_bits,
    snapshot,
    unpack,
    unpack_folder,
)

INDEX = "pytorch_model.bin.index.json"


def _tensor(array: Array) -> torch.Tensor:
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _state(dtype: Any = BF16) -> dict[str, torch.Tensor]:
    return {name: _tensor(np.asarray(a)) for name, a in base_tensors(dtype).items()}


def _save(
    folder: Path,
    state: Mapping[str, torch.Tensor] | None = None,
    *,
    shards: int = 1,
    files: Mapping[str, str] | None = None,
    **options: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = _state() if state is None else state
    if shards == 1:
        torch.save(dict(state), folder / "pytorch_model.bin", **options)
    else:
        names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
        weight_map = {name: names[i % shards] for i, name in enumerate(state)}
        for shard in names:
            mine = {name: t for name, t in state.items() if weight_map[name] == shard}
            torch.save(mine, folder / shard, **options)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_the_result_is_that_of_the_same_base_in_safetensors(tmp_path: Path, shards: int) -> None:
    files = {"config.json": '{"a": 1}', "tokenizer.json": "{}", "training_args.bin": "x"}
    _save(tmp_path / "bin", shards=shards, files=files)
    make_base(tmp_path / "base", files=files)
    adapter = make_adapter(tmp_path / "adapter", "bat")
    merge(tmp_path / "base", adapter, tmp_path / "same")
    before = snapshot(tmp_path / "bin")
    result = merge(tmp_path / "bin", adapter, tmp_path / "out", workers=2)
    found, same = unpack_folder(tmp_path / "out"), unpack_folder(tmp_path / "same")
    assert found.keys() == same.keys()
    assert all(same_bits(found[name], same[name]) for name in same)
    weights = ["model.safetensors"]
    if shards > 1:
        weights = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        weights.append("model.safetensors.index.json")
    others = ["README.md", "boneconv.json", "config.json", "tokenizer.json"]
    assert set(snapshot(tmp_path / "out")) == {*weights, *others}
    assert result.left_out == ("training_args.bin",)
    assert any(note.startswith("written as safetensors: pytorch_model") for note in result.notes)
    assert snapshot(tmp_path / "bin") == before


def test_the_index_names_the_new_files(tmp_path: Path) -> None:
    _save(tmp_path / "base", shards=2)
    merge(tmp_path / "base", make_adapter(tmp_path / "adapter"), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, shard in index["weight_map"].items():
        assert name in unpack(tmp_path / "out" / shard)
    total = sum(t.nbytes for t in unpack_folder(tmp_path / "out").values())
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("shards", [1, 2])
def test_new_shards_of_a_given_size(tmp_path: Path, shards: int) -> None:
    _save(tmp_path / "base", shards=shards)
    adapter = make_adapter(tmp_path / "adapter")
    merge(tmp_path / "base", adapter, tmp_path / "out", max_shard_size="1500")
    names = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_transformers_reads_the_header(tmp_path: Path) -> None:
    from safetensors import safe_open

    _save(tmp_path / "base")
    merge(tmp_path / "base", make_adapter(tmp_path / "adapter"), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_that_share_their_bytes_are_written_under_each_name(tmp_path: Path) -> None:
    state = _state()
    state["lm_head.weight"] = state[EMBEDDING]
    state["model.part"] = state[EMBEDDING][2:5]
    _save(tmp_path / "base", state)
    adapter = make_adapter(tmp_path / "adapter")
    result = merge(tmp_path / "base", adapter, tmp_path / "out")
    found = unpack_folder(tmp_path / "out")
    assert same_bits(found["lm_head.weight"], found[EMBEDDING])
    assert same_bits(found["model.part"], found[EMBEDDING][2:5])
    (note,) = [text for text in result.notes if "share one tensor" in text]
    assert f"{EMBEDDING}, lm_head.weight" in note
    assert "model.part" not in note


def test_safetensors_come_first(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards=2)
    (base / "pytorch_model.bin").write_bytes(b"stale")
    (base / INDEX).write_text("stale")
    found = open_checkpoint(base)
    assert all(name.endswith(".safetensors") for name in found.shards)
    assert {str(path) for path in found.left_out} == {"pytorch_model.bin", INDEX}


def test_a_stray_safetensors_file_is_not_the_model(tmp_path: Path) -> None:
    base = _save(tmp_path / "base")
    (base / "adapter_model.safetensors").write_bytes(b"something else")
    found = open_checkpoint(base)
    assert list(found.shards) == ["pytorch_model.bin"]
    assert [str(path) for path in found.left_out] == ["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.fp16.safetensors"),
    ],
)
def test_names_of_files(tmp_path: Path, name: str, written: str) -> None:
    (_save(tmp_path / "base") / "pytorch_model.bin").rename(tmp_path / "base" / name)
    plan = plan_merge(tmp_path / "base", make_adapter(tmp_path / "adapter")).plan
    assert [shard.name for shard in plan.shards] == [written]


def test_an_index_of_a_variant(tmp_path: Path) -> None:
    base = _save(tmp_path / "base", shards=2)
    (base / INDEX).rename(base / "pytorch_model.bin.index.fp16.json")
    plan = plan_merge(base, make_adapter(tmp_path / "adapter")).plan
    assert [str(n) for n in plan.texts if "index" in n.name] == [
        "model.safetensors.index.fp16.json"
    ]


def test_the_hub_s_cache(tmp_path: Path) -> None:
    real = _save(tmp_path / "blobs", shards=2)
    base = tmp_path / "snapshots" / "0123"
    base.mkdir(parents=True)
    for path in real.iterdir():
        (base / path.name).symlink_to(os.path.relpath(path, base))
    assert set(open_checkpoint(base).tensors) == set(_state())


def test_verify_inspect_and_unmerge(tmp_path: Path) -> None:
    state = _state()
    base = _save(tmp_path / "base", state, shards=2)
    adapter = make_adapter(tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out")
    assert verify(base, adapter, tmp_path / "out", workers=1).passed
    found = inspect(base)
    assert isinstance(found, CheckpointSummary)
    assert [shard.name for shard in found.shards] == sorted(p.name for p in base.glob("*.bin"))
    unmerge(tmp_path / "out", adapter, tmp_path / "back")
    back = unpack_folder(tmp_path / "back")
    for name, tensor in state.items():
        difference = back[name].astype(np.float64) - tensor.double().numpy()
        assert np.abs(difference).max() < 0.1


# --- what is refused --------------------------------------------------------------------------


def test_old_torch_files(tmp_path: Path) -> None:
    base = _save(tmp_path / "base", _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"before torch 1\.6.*save it again with torch\.save"):
        open_checkpoint(base)


def test_transposed_views(tmp_path: Path) -> None:
    base = _save(tmp_path / "base", {"a.weight": torch.zeros(2, 3).T})
    with pytest.raises(FormatError, match=r"values in order.*contiguous"):
        open_checkpoint(base)


def test_a_position_that_was_expanded_is_in_order(tmp_path: Path) -> None:
    state = {"a": torch.arange(6).expand((1, -1))}
    found = open_checkpoint(_save(tmp_path / "base", state)).tensors["a"]
    assert (found.shape, found.nbytes) == ((1, 6), 48)


def test_a_missing_shard_and_a_name_twice(tmp_path: Path) -> None:
    base = _save(tmp_path / "base", shards=2)
    second = base / "pytorch_model-00002-of-00002.bin"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(MissingPathError):
        open_checkpoint(base)
    second.write_bytes((base / "pytorch_model-00001-of-00002.bin").read_bytes())
    with pytest.raises(NameMatchError, match="stands in two shards"):
        open_checkpoint(base)
    second.write_bytes(content)
    assert open_checkpoint(base).tensors


@pytest.mark.parametrize("name", ["../x.bin", "model.safetensors", "x.pth", "a/b.bin"])
def test_an_index_that_names_other_files(tmp_path: Path, name: str) -> None:
    base = _save(tmp_path / "base", shards=2)
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match=r"points outside|no \.bin file"):
        open_checkpoint(base)


def test_an_index_beside_a_file_that_it_does_not_name(tmp_path: Path) -> None:
    base = _save(tmp_path / "base", shards=2)
    torch.save({"a": torch.zeros(2)}, base / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"holds both pytorch_model\.bin and"):
        open_checkpoint(base)
    (base / INDEX).rename(base / "pytorch_model.bin.index.fp16.json")
    assert list(open_checkpoint(base).shards) == ["pytorch_model.bin"]


def test_a_float64_base(tmp_path: Path) -> None:
    state = {name: _tensor(np.asarray(a)) for name, a in base_tensors(np.dtype("f8")).items()}
    _save(tmp_path / "base", state)
    merge(tmp_path / "base", make_adapter(tmp_path / "adapter"), tmp_path / "out")
    assert unpack_folder(tmp_path / "out")[EMBEDDING].dtype == np.float64
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "single", dtype="float32")
    assert unpack_folder(tmp_path / "single")[EMBEDDING].dtype == F32


def test_experts_by_themselves_and_fused(tmp_path: Path) -> None:
    layer = "model.layers.0.block_sparse_moe"
    experts = {
        f"{layer}.experts.{i}.{w}.weight": grid(shape, BF16, i)
        for i in range(3)
        for w, shape in {"w1": (20, 12), "w2": (12, 20)}.items()
    }
    block = grid((4, 20), F32)
    adapter = make_adapter(tmp_path / "adapter", blocks={f"{layer}.experts.2.w1": block})
    make_base(tmp_path / "base", base_tensors() | experts)
    merge(tmp_path / "base", adapter, tmp_path / "out")
    found = unpack_folder(tmp_path / "out")
    changed = [name for name in experts if not same_bits(found[name], experts[name])]
    assert changed == [f"{layer}.experts.2.w1.weight"]
    fused = {f"{layer}.experts.gate_up_proj": grid((3, 40, 12), BF16)}
    make_base(tmp_path / "fused", base_tensors() | fused)
    with pytest.raises(NameMatchError, match=r"1 of its 1 tensors belong to single experts.*"):
        merge(tmp_path / "fused", adapter, tmp_path / "never")
    make_base(tmp_path / "lacking", base_tensors())
    with pytest.raises(NameMatchError, match="have no home in the base"):
        merge(tmp_path / "lacking", adapter, tmp_path / "never")
    whole = make_adapter(tmp_path / "whole", blocks={f"{layer}.experts.gate_up_proj": block})
    with pytest.raises(NameMatchError, match="have no home in the base"):
        merge(tmp_path / "fused", whole, tmp_path / "never")
    assert not (tmp_path / "never").exists()


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}
HEAD = "lm_head.weight"
Q0 = "model.layers.0.self_attn.q_proj"
OTHER = grid((32, 12), F32, 5)
CHANGES: dict[str, tuple[dict[str, Any], bool]] = {
    "a block": ({"blocks": {"lm_head": grid((4, 32), F32)}}, True),
    "saved": ({"saved": {HEAD: OTHER}, "modules_to_save": ["lm_head"]}, True),
    "embedding saved": ({"saved": {EMBEDDING: OTHER}, "modules_to_save": ["embed_tokens"]}, True),
    "both saved and equal": (
        {
            "saved": {HEAD: OTHER, EMBEDDING: OTHER},
            "modules_to_save": ["lm_head", "embed_tokens"],
        },
        False,
    ),
    "neither": ({}, False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stored_head_that_parts_from_its_embedding_is_untied(tmp_path: Path, change: str) -> None:
    """Older files hold the tied head too; loaders would put the embedding in its place again."""
    fields, untied = CHANGES[change]
    state = _state()
    state[HEAD] = state[EMBEDDING]
    base = _save(tmp_path / "base", state, files={"config.json": json.dumps(LLAMA)})
    adapter = make_adapter(tmp_path / "adapter", **{"blocks": {Q0: grid((4, 12), F32)}, **fields})
    result = merge(base, adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == LLAMA | {"tie_word_embeddings": not untied}
    found = unpack_folder(tmp_path / "out")
    assert same_bits(found[HEAD], found[EMBEDDING]) != untied
    if change in ("a block", "saved"):
        assert any(f"{HEAD} was tied to {EMBEDDING}" in note for note in result.notes)
