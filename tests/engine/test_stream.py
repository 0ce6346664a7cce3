"""Streaming: the same bytes and digests whoever computes them, in pieces of whatever size."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boneconv.engine import segments, stream
from boneconv.engine.plan import Action, PlannedShard, PlannedTensor, Update
from boneconv.engine.stream import ShardDigests
from boneconv.errors import FormatError, MachineError, NonFiniteError
from boneconv.formats import read_adapter
from boneconv.io.files import Writer
from boneconv.io.safetensors import ArrayTensor, read_header
from tests.builders import (
    BF16,
    F16,
    F32,
    block_for,
    grid,
    make_adapter,
    merged,
    pack,
    same_bits,
    tree_digest,
    unpack,
)
from tests.sharing import sharing_file_system

MIB = 1024 * 1024
SHAPE = (1536, 768)  # 2.25 MiB in bfloat16: three leaves, the last one short
WAYS = [(1, False), (2, False), (3, True), (4, True)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    path.write_bytes(pack({name: grid(SHAPE, BF16, seed) for seed, name in enumerate("abc")}))
    return path


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Update]:
    found = {}
    for variant in ("bone", "bat"):
        folder = tmp_path_factory.mktemp(variant)
        block = block_for(variant, SHAPE, rank=64)
        make_adapter(folder, variant, rank=64, blocks={"a": block})
        found[variant] = Update(read_adapter(folder).blocks["a"])
    return found


def _shards(base: Path, blocks: dict[str, Update], dtype: str = "BF16") -> list[PlannedShard]:
    stored = read_header(base).tensors
    cast = Action.COPY if dtype == "BF16" else Action.CAST
    new = ArrayTensor("new", grid((700, 900), F32, 9))
    return [
        PlannedShard.lay_out(
            "one",
            [
                PlannedTensor("a", dtype, Action.MERGE, stored["a"], (blocks["bone"],)),
                PlannedTensor("b", dtype, cast, stored["b"]),
            ],
            {"format": "pt"},
        ),
        PlannedShard.lay_out(
            "two",
            [
                PlannedTensor("c", dtype, Action.MERGE, stored["c"], (blocks["bat"],)),
                PlannedTensor("new", dtype, Action.ADD, new),
                PlannedTensor("empty", dtype, Action.ADD, ArrayTensor("e", grid((0, 3)))),
            ],
            {},
        ),
        PlannedShard.lay_out("nothing", [], {"format": "pt"}),
    ]


def _stream(
    shards: list[PlannedShard],
    folder: Path,
    workers: int = 1,
    found: dict[str, ShardDigests] | None = None,
    **more: Any,
) -> dict[str, ShardDigests]:
    """What was told of every shard; ``found`` takes it too, for those who expect an error."""
    folder.mkdir(exist_ok=True)
    found = {} if found is None else found
    stream.stream(
        shards,
        lambda shard: folder / shard.name,
        workers=workers,
        finished=lambda shard, digests: found.update({shard.name: digests}),
        **more,
    )
    return found


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [("BF16", BF16), ("F32", F32), ("F16", F16)], ids=str
)
def test_every_tensor_has_the_values_it_must_have(
    base: Path, blocks: dict[str, Update], tmp_path: Path, dtype: str, numpy_dtype: Any
) -> None:
    _stream(_shards(base, blocks, dtype), tmp_path / "out")
    old = unpack(base)
    one, two = unpack(tmp_path / "out" / "one"), unpack(tmp_path / "out" / "two")
    bone, bat = (blocks[name].block.tensor.read() for name in ("bone", "bat"))
    assert same_bits(one["a"], merged(old["a"], bone, "bone", dtype=numpy_dtype))
    assert same_bits(one["b"], old["b"].astype(numpy_dtype))
    assert same_bits(two["c"], merged(old["c"], bat, "bat", dtype=numpy_dtype))
    assert same_bits(two["new"], grid((700, 900), F32, 9).astype(numpy_dtype))
    assert read_header(tmp_path / "out" / "nothing").metadata == {"format": "pt"}


def test_digests_are_of_what_was_read_and_written(
    base: Path, blocks: dict[str, Update], tmp_path: Path
) -> None:
    found = _stream(_shards(base, blocks), tmp_path / "out")
    old = unpack(base)
    assert set(found) == {"one", "two", "nothing"}
    for shard in ("one", "two"):
        written = unpack(tmp_path / "out" / shard)
        for name, digests in found[shard].items():
            assert digests.output == tree_digest("BF16", written[name]), name
            expected = tree_digest("BF16", old[name]) if name in ("a", "c") else None
            assert digests.base == expected, name


@pytest.fixture(scope="module")
def expected(
    base: Path, blocks: dict[str, Update], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], dict[str, ShardDigests]]:
    folder = tmp_path_factory.mktemp("expected") / "out"
    digests = _stream(_shards(base, blocks), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}, digests


@pytest.mark.parametrize(("workers", "processes"), WAYS)
@pytest.mark.parametrize("target", [1, MIB, 2 * MIB, 64 * MIB])
def test_bytes_and_digests_do_not_depend_on_workers_or_segments(
    base: Path,
    blocks: dict[str, Update],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: tuple[dict[str, bytes], dict[str, ShardDigests]],
    workers: int,
    processes: bool,
    target: int,
) -> None:
    monkeypatch.setattr(segments, "_TARGET", target)
    monkeypatch.setattr(stream, "can_fork", lambda: processes)
    digests = _stream(_shards(base, blocks), tmp_path / "out", workers)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == expected[0]
    assert digests == expected[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_adds_up_to_the_tensors(
    base: Path, blocks: dict[str, Update], tmp_path: Path, workers: int
) -> None:
    shards, told = _shards(base, blocks), []
    _stream(shards, tmp_path / "out", workers, advance=told.append)
    assert sum(told) == sum(tensor.nbytes for shard in shards for tensor in shard.tensors)


def test_a_shard_is_finished_after_its_flush(
    base: Path, blocks: dict[str, Update], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    sync = Writer.sync

    def syncing(self: Writer) -> None:
        sync(self)
        events.append(("flushed", self.path.name))

    monkeypatch.setattr(Writer, "sync", syncing)
    (tmp_path / "out").mkdir()
    stream.stream(
        _shards(base, blocks),
        lambda shard: tmp_path / "out" / shard.name,
        workers=2,
        finished=lambda shard, _: events.append(("finished", shard.name)),
    )
    for name in ("one", "two", "nothing"):
        assert events.index(("flushed", name)) + 1 == events.index(("finished", name))


def test_untouched_tensors_share_the_base_s_blocks_where_that_can_be(
    base: Path, blocks: dict[str, Update], tmp_path: Path
) -> None:
    file = read_header(base)
    stored = file.tensors
    same = [PlannedTensor(n, t.dtype, Action.COPY, t) for n, t in stored.items()]
    shards = [PlannedShard.like(file, base.name, same)]
    copied = _stream(shards, tmp_path / "copied")
    with sharing_file_system() as shared:
        found = _stream(shards, tmp_path / "shared")
    assert found == copied
    for folder in ("copied", "shared"):
        assert unpack(tmp_path / folder / base.name).keys() == stored.keys()
        for name, array in unpack(tmp_path / folder / base.name).items():
            assert same_bits(array, unpack(base)[name])
    assert sum(shared) > 0.8 * sum(tensor.nbytes for tensor in same)


@pytest.mark.parametrize("variant", ["bone", "bat"])
@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [("BF16", BF16), ("F32", F32), ("F16", F16)], ids=str
)
def test_tensors_at_odd_offsets(
    tmp_path: Path, blocks: dict[str, Update], variant: str, dtype: str, numpy_dtype: Any
) -> None:
    weight, copied = grid(SHAPE, BF16, 1), grid(SHAPE, BF16, 2)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(pack({"odd": np.array([1, 2, 3], np.uint8), "a": weight, "b": copied}))
    stored = read_header(path).tensors
    assert stored["a"].offset % 2 == 1
    action = Action.COPY if dtype == "BF16" else Action.CAST
    tensors = [
        PlannedTensor("odd", "U8", Action.COPY, stored["odd"]),
        PlannedTensor("a", dtype, Action.MERGE, stored["a"], (blocks[variant],)),
        PlannedTensor("b", dtype, action, stored["b"]),
    ]
    _stream([PlannedShard.lay_out("one", tensors, {})], tmp_path / "out")
    written = unpack(tmp_path / "out" / "one")
    block = blocks[variant].block.tensor.read()
    assert same_bits(written["a"], merged(weight, block, variant, dtype=numpy_dtype))
    assert same_bits(written["b"], copied.astype(numpy_dtype))
    assert written["odd"].tolist() == [1, 2, 3]


# --- errors -----------------------------------------------------------------------------------


def test_a_flush_that_fails_leaves_its_shard_incomplete(
    base: Path, blocks: dict[str, Update], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete: dict[str, ShardDigests] = {}

    def one_fails(self: Writer) -> None:
        if self.path.name == "one":
            raise MachineError("no space left", path=self.path)

    monkeypatch.setattr(Writer, "sync", one_fails)
    with pytest.raises(MachineError, match="no space left"):
        _stream(_shards(base, blocks), tmp_path / "out", found=complete)
    assert "one" not in complete


def _with_value(base: Path, folder: Path, value: float) -> Path:
    tensors = {name: array.copy() for name, array in unpack(base).items()}
    tensors["c"][-1, -1] = value
    path = folder / "bad.safetensors"
    path.write_bytes(pack(tensors))
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_merged_weight_that_is_not_finite_is_named(
    base: Path, blocks: dict[str, Update], tmp_path: Path, value: float, workers: int
) -> None:
    bad = _with_value(base, tmp_path, value)
    with pytest.raises(NonFiniteError) as caught:
        _stream(_shards(bad, blocks), tmp_path / "out", workers)
    assert "'c': the weight at row 1535, column 767 is not finite" in str(caught.value)
    assert caught.value.path == str(bad)


def test_a_copied_tensor_may_hold_anything(
    base: Path, blocks: dict[str, Update], tmp_path: Path
) -> None:
    tensors = {name: array.copy() for name, array in unpack(base).items()}
    tensors["b"][0, :3] = [np.nan, np.inf, -np.inf]
    path = tmp_path / "odd.safetensors"
    path.write_bytes(pack(tensors))
    _stream(_shards(path, blocks), tmp_path / "out")
    assert same_bits(unpack(tmp_path / "out" / "one")["b"], tensors["b"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_added_tensor_that_is_not_finite(tmp_path: Path, value: float) -> None:
    array = grid((4, 4))
    array[2, 3] = value
    planned = PlannedTensor("new", "F32", Action.ADD, ArrayTensor("n", array))
    with pytest.raises(NonFiniteError, match="'new'"):
        _stream([PlannedShard.lay_out("x", [planned], {})], tmp_path / "out")


def test_a_value_beyond_the_new_dtype(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    path.write_bytes(pack({"t": np.array([1.0, 70000.0], F32)}))
    planned = PlannedTensor("t", "F16", Action.CAST, read_header(path).tensors["t"])
    with pytest.raises(NonFiniteError, match=r"'t'.*float16"):
        _stream([PlannedShard.lay_out("x", [planned], {})], tmp_path / "out")


def test_a_base_that_was_cut_after_planning(
    base: Path, blocks: dict[str, Update], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(base.read_bytes())
    shards = _shards(copy, blocks)
    os.truncate(copy, 4 * MIB)
    with pytest.raises(FormatError, match="ends too early"):
        _stream(shards, tmp_path / "out")


def test_shards_that_were_complete_are_told_before_the_error(
    base: Path, blocks: dict[str, Update], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in the second shard does not take back the first one, slow as its flush may be."""
    real: Callable[..., Any] = Writer.write_at

    def failing(self: Writer, data: Any, offset: int) -> None:
        if self.path.name == "two" and offset > 1000:
            raise MachineError("broken", path=self.path)
        real(self, data, offset)

    monkeypatch.setattr(Writer, "write_at", failing)
    told: dict[str, ShardDigests] = {}
    with pytest.raises(MachineError, match="broken"):
        _stream(_shards(base, blocks), tmp_path / "out", found=told)
    assert list(told) == ["one"]
