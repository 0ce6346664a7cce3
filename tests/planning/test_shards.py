"""From accounts to files: the base's own, byte for byte where nothing changes, or new ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from boneconv.engine.plan import PlannedShard
from boneconv.errors import UsageError
from boneconv.io.checkpoint import Checkpoint, open_checkpoint
from boneconv.io.safetensors import ArrayTensor
from boneconv.planning.accounts import Accounts, Addition
from boneconv.planning.shards import encode_index, parse_size, plan_shards
from tests.builders import (
    EMBEDDING,
    F16,
    HIDDEN,
    Raw,
    base_tensors,
    grid,
    make_base,
    pack,
    raw_file,
    write_index,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("1500", 1500),
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("5G", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("500MiB", 500 * 2**20),
        ("2 kB", 2000),
        ("0.5 MB", 500_000),
        ("1.5KiB", 1536),
        (" 2TB ", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "GB", "0", "0GB", "-5GB", "5XB", "5 G B", "1e9", "5GBs", "0.1", "inf", "nan", "9" * 400],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"not a size.*expected a size such as 5GB or 500MiB"):
        parse_size(text)


def _plan(
    base: Checkpoint, accounts: Accounts | None = None, **options: Any
) -> tuple[PlannedShard, ...]:
    options = {"dtype": None, "max_shard_size": None} | options
    return plan_shards(base, accounts or Accounts(), **options)


# --- the base's own files ---------------------------------------------------------------------

#: A header that no library writes: other spaces, metadata last, tensors in another order.
ODD = (
    b'{ "b" : {"shape":[2], "dtype":"F32","data_offsets": [4, 12]},\n'
    b'"a":{"data_offsets":[0,4],"dtype":"I32","shape":[1]}, "__metadata__":{"z":"","a":"\\u00e9"}} '
)


def test_headers_are_kept_byte_for_byte(tmp_path: Path) -> None:
    content = raw_file(ODD, bytes(12))
    (tmp_path / "model.safetensors").write_bytes(content)
    (shard,) = _plan(open_checkpoint(tmp_path))
    assert shard.head == content[: len(ODD) + 8]
    assert shard.size == len(content)
    assert [tensor.name for tensor in shard.tensors] == ["a", "b"]
    assert shard.offsets == {"a": len(ODD) + 8, "b": len(ODD) + 12}


def test_the_same_files_with_the_same_tensors_in_the_same_order(tmp_path: Path) -> None:
    base = open_checkpoint(make_base(tmp_path, shards=3))
    found = _plan(base)
    assert [shard.name for shard in found] == list(base.shards)
    for shard in found:
        assert [t.name for t in shard.tensors] == list(base.shards[shard.name].tensors)
    assert encode_index(base, found) is None


def test_another_dtype_needs_another_header_with_the_same_metadata(tmp_path: Path) -> None:
    base = open_checkpoint(make_base(tmp_path, metadata={"format": "pt", "by": "someone"}))
    (shard,) = _plan(base, dtype="F32")
    assert json.loads(shard.head[8:])["__metadata__"] == {"format": "pt", "by": "someone"}
    dtypes = {tensor.name: tensor.dtype for tensor in shard.tensors}
    assert dtypes.pop("model.position_ids") == "I64"
    assert set(dtypes.values()) == {"F32"}


def test_integers_and_small_floats_are_never_cast(tmp_path: Path) -> None:
    tensors = {"q": Raw("F8_E4M3", (2,), b"ab"), "i": Raw("I32", (1,), bytes(4)), "w": grid((2,))}
    (tmp_path / "model.safetensors").write_bytes(pack(tensors))
    (shard,) = _plan(open_checkpoint(tmp_path), dtype="BF16")
    assert [(t.name, t.dtype) for t in shard.tensors] == [
        ("q", "F8_E4M3"),
        ("i", "I32"),
        ("w", "BF16"),
    ]


def test_a_new_tensor_goes_beside_its_like_with_its_dtype(tmp_path: Path) -> None:
    base = open_checkpoint(make_base(tmp_path, base_tensors(F16), shards=3))
    head = ArrayTensor("h", grid((4, HIDDEN)))
    accounts = Accounts(
        added={"lm_head.weight": Addition(head, EMBEDDING), "score.weight": Addition(head, None)}
    )
    found = {shard.name: shard for shard in _plan(base, accounts)}
    first, last = found[base.shard_of[EMBEDDING]], found[list(base.shards)[-1]]
    assert (first.tensors[-1].name, first.tensors[-1].dtype) == ("lm_head.weight", "F16")
    assert (last.tensors[-1].name, last.tensors[-1].dtype) == ("score.weight", "F16")
    index = json.loads(encode_index(base, found.values()) or b"")
    assert index["weight_map"]["lm_head.weight"] == first.name
    assert index["weight_map"]["score.weight"] == last.name
    assert list(index["weight_map"])[:-2] == list(base.index["weight_map"])


# --- new files --------------------------------------------------------------------------------


def test_no_file_is_larger_than_asked_but_for_a_larger_tensor(tmp_path: Path) -> None:
    base = open_checkpoint(make_base(tmp_path, shards=2))
    found = _plan(base, max_shard_size=600)
    assert [shard.name for shard in found] == [
        f"model-{i + 1:05d}-of-{len(found):05d}.safetensors" for i in range(len(found))
    ]
    assert [t.name for shard in found for t in shard.tensors] == list(base.tensors)
    for shard in found:
        size = sum(tensor.nbytes for tensor in shard.tensors)
        assert size <= 600 or len(shard.tensors) == 1
    for one, two in itertools.pairwise(found):
        assert sum(t.nbytes for t in one.tensors) + two.tensors[0].nbytes > 600


def test_everything_in_one_file(tmp_path: Path) -> None:
    base = open_checkpoint(make_base(tmp_path, shards=3))
    (shard,) = _plan(base, max_shard_size=10**9)
    assert shard.name == "model.safetensors"


@pytest.mark.parametrize("name", ["model", "diffusion_pytorch_model", "weights"])
def test_new_files_are_called_like_the_old_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.safetensors").write_bytes(pack({"a": grid((9,)), "b": grid((9,))}))
    found = _plan(open_checkpoint(tmp_path), max_shard_size=40)
    assert [s.name for s in found] == [f"{name}-0000{i}-of-00002.safetensors" for i in (1, 2)]


# --- the index --------------------------------------------------------------------------------


def test_an_index_says_where_everything_is_and_how_much(tmp_path: Path) -> None:
    base = open_checkpoint(make_base(tmp_path))
    found = _plan(base, max_shard_size=600)
    index = json.loads(encode_index(base, found) or b"")
    assert index["weight_map"] == {t.name: s.name for s in found for t in s.tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in base.tensors.values())


def test_what_else_an_index_says_is_kept(tmp_path: Path) -> None:
    make_base(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    write_index(tmp_path, weight_map, note="kept", metadata={"total_parameters": 100, "x": "y"})
    base = open_checkpoint(tmp_path)
    head = Addition(ArrayTensor("h", grid((2, 3))), EMBEDDING)
    found = _plan(base, Accounts(added={"lm_head.weight": head}))
    index = json.loads(encode_index(base, found) or b"")
    assert index["note"] == "kept"
    assert index["metadata"]["x"] == "y"
    assert index["metadata"]["total_parameters"] == 106


@pytest.mark.parametrize("count", ["many", None, [1]])
def test_a_count_of_parameters_that_is_none_is_left_alone(tmp_path: Path, count: Any) -> None:
    make_base(tmp_path, shards=2)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(tmp_path, weight_map, metadata={"total_parameters": count})
    base = open_checkpoint(tmp_path)
    index = json.loads(encode_index(base, _plan(base, dtype="F32")) or b"")
    assert index["metadata"]["total_parameters"] == count
