"""Segments: every row once, whole blocks, whole digest leaves, in the order of the bytes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boneconv.adapter import Block
from boneconv.config import Axis, Variant
from boneconv.dtypes import FLOATS, SIZES
from boneconv.engine import segments
from boneconv.engine.plan import Action, PlannedShard, PlannedTensor, Update
from boneconv.engine.segments import Segment, segments_of
from boneconv.io.safetensors import StoredTensor, tensor_nbytes

MIB = 1024 * 1024
FLOAT = st.sampled_from(sorted(FLOATS))


def _stored(dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(Path("base"), "t", dtype, shape, 0, tensor_nbytes(dtype, shape))


def _bat(rank: int, axis: Axis, length: int) -> Update:
    tensor = _stored("F32", (length // rank, rank, rank))
    return Update(Block("t", Variant.BAT, axis, tensor, rank))


def _shard(*tensors: PlannedTensor) -> PlannedShard:
    return PlannedShard.lay_out("x.safetensors", tensors, {})


def _planned(
    dtype: str,
    shape: tuple[int, ...],
    action: Action = Action.COPY,
    source: str | None = None,
    updates: tuple[Update, ...] = (),
    name: str = "t",
) -> PlannedTensor:
    return PlannedTensor(name, dtype, action, _stored(source or dtype, shape), updates)


def _covers(found: list[Segment], tensor: PlannedTensor, rows: int) -> None:
    assert [segment.first_row for segment in found] == [
        sum(s.rows for s in found[:i]) for i in range(len(found))
    ]
    assert sum(segment.rows for segment in found) == rows
    assert sum(segment.nbytes for segment in found) == tensor.nbytes
    assert all(segment.rows > 0 for segment in found)


@given(
    dtype=st.sampled_from(sorted(SIZES)),
    shape=st.lists(st.integers(0, 3000), max_size=3).map(tuple),
)
@settings(max_examples=100)
def test_a_copied_tensor_is_covered_once(dtype: str, shape: tuple[int, ...]) -> None:
    if math.prod(shape) * SIZES[dtype] % 8 or math.prod(shape) > 2**28:
        return
    tensor = _planned(dtype, shape)
    found = list(segments_of(_shard(tensor)))
    rows = math.prod(shape) if dtype in FLOATS else tensor.nbytes
    _covers(found, tensor, rows)
    assert all(segment.first_row * tensor.nbytes // rows % MIB == 0 for segment in found)


@given(source=FLOAT, target=FLOAT, rows=st.integers(1, 40_000), width=st.integers(1, 300))
@settings(max_examples=100)
def test_a_merged_tensor_holds_whole_leaves_before_and_after(
    source: str, target: str, rows: int, width: int
) -> None:
    tensor = _planned(target, (rows, width), Action.MERGE, source)
    found = list(segments_of(_shard(tensor)))
    _covers(found, tensor, rows)
    assert all(segment.row_elements == width for segment in found)
    for dtype in (source, target):
        row_bytes = width * FLOATS[dtype].itemsize
        assert all(segment.first_row * row_bytes % MIB == 0 for segment in found)


@given(
    ranks=st.lists(st.sampled_from([1, 2, 3, 4, 8, 20, 64]), min_size=1, max_size=3),
    tiles=st.integers(1, 60),
    columns=st.integers(1, 4),
    dtype=FLOAT,
)
@settings(max_examples=100)
def test_blocks_over_the_output_axis_stay_whole(
    ranks: list[int], tiles: int, columns: int, dtype: str
) -> None:
    unit = math.lcm(*ranks)
    rows, width = unit * tiles, unit * columns
    updates = tuple(_bat(rank, Axis.OUT, rows) for rank in ranks)
    tensor = _planned(dtype, (rows, width), Action.MERGE, updates=updates)
    found = list(segments_of(_shard(tensor)))
    _covers(found, tensor, rows)
    assert all(segment.first_row % rank == 0 for segment in found for rank in ranks)


def test_blocks_over_the_input_axis_couple_no_rows() -> None:
    out = _planned("F32", (4096, 4096), Action.MERGE, updates=(_bat(96, Axis.OUT, 4096 - 64),))
    along = _planned("F32", (4096, 4096), Action.MERGE, updates=(_bat(96, Axis.IN, 4096 - 64),))
    steps = [next(segments_of(_shard(tensor))).rows for tensor in (out, along)]
    assert steps[0] % 96 == 0
    assert steps[1] == 32 * MIB // (4096 * 4)


def test_a_large_tensor_is_cut_into_several() -> None:
    tensor = _planned("BF16", (4096, 11008), Action.MERGE)
    found = list(segments_of(_shard(tensor)))
    assert len(found) > 1
    assert max(segment.nbytes for segment in found) <= 64 * MIB


def test_the_size_of_segments_is_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = _planned("F32", (1024, 1024))
    assert len(list(segments_of(_shard(tensor)))) == 1
    monkeypatch.setattr(segments, "_TARGET", MIB)
    assert len(list(segments_of(_shard(tensor)))) == 4


def test_a_convolution_of_one_pixel_is_a_matrix() -> None:
    tensor = _planned("F32", (8, 6, 1, 1), Action.MERGE)
    (segment,) = segments_of(_shard(tensor))
    assert (segment.rows, segment.row_elements) == (8, 6)


def test_segments_come_in_the_order_of_the_bytes_and_empty_tensors_have_none() -> None:
    shard = _shard(
        _planned("F32", (2, 3), name="a"),
        _planned("F32", (0, 3), name="empty"),
        _planned("BF16", (4, 0), Action.MERGE, name="flat"),
        _planned("I64", (), name="scalar"),
    )
    found = list(segments_of(shard))
    assert [segment.tensor.name for segment in found] == ["a", "scalar"]
    assert [segment.offset for segment in found] == [shard.offsets["a"], shard.offsets["scalar"]]
    assert found[1].nbytes == 8
