"""A base checkpoint on disk: the index is trusted, and every contradiction is named."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from boneconv.errors import FormatError, MissingPathError, NameMatchError
from boneconv.io.checkpoint import open_checkpoint
from tests.builders import (
    base_tensors,
    grid,
    make_adapter,
    make_base,
    pack,
    raw_file,
    same_bits,
    unpack,
    write_index,
)


def _paths(names: tuple[PurePosixPath, ...]) -> set[str]:
    return set(map(str, names))


# --- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_all_tensors_of_all_shards(tmp_path: Path, shards: int) -> None:
    tensors = base_tensors()
    found = open_checkpoint(make_base(tmp_path, shards=shards))
    assert set(found.tensors) == set(tensors)
    assert len(found.shards) == shards
    assert set(found.shard_of.values()) == set(found.shards)
    assert (found.index_name is None) == (shards == 1)
    assert found.single_file is False
    assert found.left_out == found.side_files == ()


def test_tensors_are_read_from_the_shard_that_the_index_names(tmp_path: Path) -> None:
    found = open_checkpoint(make_base(tmp_path, shards=3))
    for name, shard in found.shard_of.items():
        if found.tensors[name].dtype == "BF16":
            assert same_bits(found.tensors[name].read(), unpack(tmp_path / shard)[name])


def test_a_single_file_is_a_checkpoint_without_a_folder(tmp_path: Path) -> None:
    base = make_base(tmp_path, files={"tokenizer.json": "{}"})
    found = open_checkpoint(base / "model.safetensors")
    assert found.single_file
    assert list(found.shards) == ["model.safetensors"]
    assert found.side_files == found.left_out == ()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "anything.safetensors"]
)
def test_one_file_of_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pack({"a": grid((2, 2))}))
    assert list(open_checkpoint(tmp_path).shards) == [name]


def test_model_safetensors_wins_over_other_files(tmp_path: Path) -> None:
    make_base(tmp_path)
    (tmp_path / "old.safetensors").write_bytes(b"not read")
    found = open_checkpoint(tmp_path)
    assert list(found.shards) == ["model.safetensors"]
    assert _paths(found.left_out) == {"old.safetensors"}


def test_the_index_is_trusted_over_the_listing(tmp_path: Path) -> None:
    make_base(tmp_path, shards=2)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"stale")
    found = open_checkpoint(tmp_path)
    assert len(found.shards) == 2
    assert _paths(found.left_out) == {"model-00003-of-00003.safetensors"}


def test_links_of_the_hub_s_cache_are_followed(tmp_path: Path) -> None:
    real = make_base(tmp_path / "blobs", shards=2, files={"tokenizer.json": "{}"})
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in real.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    found = open_checkpoint(snapshot)
    assert set(found.tensors) == set(base_tensors())
    assert _paths(found.side_files) == {"tokenizer.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_link_out_of_a_plain_folder_is_refused(tmp_path: Path, name: str) -> None:
    files = {"tokenizer.json": "{}", "config.json": "{}"}
    base = make_base(tmp_path / "base", files=files)
    (base / name).rename(tmp_path / "elsewhere")
    (base / name).symlink_to("../elsewhere")
    with pytest.raises(FormatError, match="a link leads out of its folder"):
        open_checkpoint(base)


# --- the other files --------------------------------------------------------------------------


def test_side_files_and_other_copies_of_the_weights(tmp_path: Path) -> None:
    kept = ["config.json", "tokenizer.json", "sub/deep/code.py", "1_Pooling/config.json", ".hidden"]
    copies = ["pytorch_model.bin", "model.onnx", "onnx/model.json", "original/params.json"]
    copies += ["sub/tf_model.h5", "a.gguf", "pytorch_model.bin.index.json", "flax_model.msgpack"]
    ignored = [".git/config", ".cache/x", "__pycache__/y.pyc", ".gitattributes"]
    make_base(tmp_path, files=dict.fromkeys([*kept, *copies, *ignored], "x"))
    found = open_checkpoint(tmp_path)
    assert _paths(found.side_files) == set(kept)
    assert _paths(found.left_out) == set(copies)


def test_a_linked_folder_is_left_out_and_listed(tmp_path: Path) -> None:
    """Following it could copy the whole disk; dropping it must not be silent."""
    base = make_base(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_text("x")
    (base / "linked").symlink_to(tmp_path / "elsewhere")
    found = open_checkpoint(base)
    assert _paths(found.side_files) == set()
    assert _paths(found.left_out) == {"linked"}


# --- what is refused --------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "value",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/inside.safetensors",
        "..",
        ".",
        "",
        None,
        3,
        ["model.safetensors"],
        {"a": 1},
    ],
)
def test_an_index_that_points_outside_its_folder(tmp_path: Path, value: Any) -> None:
    make_base(tmp_path / "base", shards=2)
    (tmp_path / "outside.safetensors").write_bytes(pack({"a": grid((2, 2))}))
    index = write_index(tmp_path / "base", {"a": value})
    with pytest.raises(FormatError, match="the index points outside its folder") as caught:
        open_checkpoint(tmp_path / "base")
    assert caught.value.path == str(index)


@pytest.mark.parametrize("name", ["a\\b.safetensors", "model.bin", "a\0.safetensors"])
def test_an_index_that_names_another_kind_of_file(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"a": name})
    with pytest.raises(FormatError, match="is no safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_an_index_without_a_weight_map(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError, match="the index has no weight_map"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("metadata", ["text", [1], 3])
def test_an_index_whose_metadata_is_no_object(tmp_path: Path, metadata: Any) -> None:
    make_base(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metadata": metadata}))
    with pytest.raises(FormatError, match="metadata"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_missing_tensors(tmp_path: Path) -> None:
    make_base(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"do not hold: model\.ghost"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    make_base(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm0"] = index["weight_map"].pop("model.embed_tokens.weight")
    index["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    del index["weight_map"]["model.norm0"]
    path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"do not hold: model\.embed_tokens\.weight"):
        open_checkpoint(tmp_path)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    make_base(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MissingPathError, match=r"model-00002-of-00003\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    make_base(tmp_path, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(pack({"model.embed_tokens.weight": grid((2, 2))}))
    with pytest.raises(NameMatchError, match="stands in two shards"):
        open_checkpoint(tmp_path)


def test_several_indexes(tmp_path: Path) -> None:
    make_base(tmp_path, shards=2)
    index = (tmp_path / "model.safetensors.index.json").read_text()
    (tmp_path / "other.safetensors.index.json").write_text(index)
    with pytest.raises(FormatError, match="several weight indexes"):
        open_checkpoint(tmp_path)


def test_an_index_beside_a_single_file_it_does_not_name(tmp_path: Path) -> None:
    make_base(tmp_path, shards=2)
    (tmp_path / "model.safetensors").write_bytes(pack({"a": grid((2, 2))}))
    with pytest.raises(FormatError, match="holds both"):
        open_checkpoint(tmp_path)


def test_several_files_and_no_index(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(raw_file({}))
    with pytest.raises(FormatError, match="several safetensors files and no index"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds no safetensors weights.*found no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"found tf_model\.h5\. Load the model and save it"):
        open_checkpoint(tmp_path)


def test_an_adapter_opens_as_what_it_holds(tmp_path: Path) -> None:
    """Base and adapter swapped is told by `read_adapter`; here it is one safetensors file."""
    found = open_checkpoint(make_adapter(tmp_path))
    assert list(found.shards) == ["adapter_model.safetensors"]
