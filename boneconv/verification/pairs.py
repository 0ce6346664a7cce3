"""What is compared with what: a planned tensor and the candidate's, in segments for workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import blake3
import numpy as np

from boneconv.digest import LeafHasher
from boneconv.dtypes import F64, FLOATS
from boneconv.engine.compute import read_rows
from boneconv.engine.dequantise import Dequantisation
from boneconv.engine.plan import Action, PlannedShard, PlannedTensor
from boneconv.engine.segments import Segment, segments_of
from boneconv.engine.station import naming_block, stages_of
from boneconv.engine.workers import Place
from boneconv.errors import NonFiniteError
from boneconv.io.files import Reader
from boneconv.io.open_files import OpenFiles
from boneconv.io.safetensors import StoredTensor, Tensor, byte_view
from boneconv.kernels import RowMerger, Scratch, cast_rows
from boneconv.kernels.scaled import ScaleGrid
from boneconv.kernels.stage import Array
from boneconv.verification.compare import compare_chunk, compare_merged
from boneconv.verification.measures import Measures
from boneconv.verification.reach import Reach

__all__ = [
    "Heads",
    "Pair",
    "Part",
    "Task",
    "Worker",
    "comparable",
    "like",
    "source_rows",
    "tasks_of",
]

_CHUNK_BYTES = 1 << 20
_HEAD = 1 << 12
#: After so many elements that nothing explains, a tensor is wrong, and no further ones are judged.
_HOPELESS = 256


@dataclass(frozen=True)
class Pair:
    """A tensor and what it should be, of one shape.

    Attributes:
        planned: What it should be; its dtype is the candidate's.
        held: The candidate's tensor.
        hashed: Whether digests of what it is merged into are wanted.
    """

    planned: PlannedTensor
    held: Tensor
    hashed: bool = False


@dataclass(frozen=True)
class Heads:
    """Digests of a tensor's first bytes, which tell tensors that were exchanged.

    Attributes:
        want: Of the expected tensor.
        have: Of the candidate's.
        base: Of the base's, as the candidate would store it.
    """

    want: bytes
    have: bytes
    base: bytes | None = None


@dataclass(frozen=True)
class Part:
    """What a worker found in a segment.

    Attributes:
        measures: How far off the candidate is.
        heads: Of a tensor's first segment.
        leaves: Digests of the base's bytes, where they are wanted.
    """

    measures: Measures
    heads: Heads | None = None
    leaves: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Task:
    """A segment of a pair."""

    pair: Pair
    segment: Segment


def tasks_of(pairs: Iterable[Pair]) -> list[Task]:
    """The segments of all pairs, in order."""
    tasks = []
    for pair in pairs:
        planned = pair.planned
        start = pair.held.offset if isinstance(pair.held, StoredTensor) else 0
        shard = PlannedShard("", (planned,), b"", {planned.name: start}, 0)
        tasks += [Task(pair, segment) for segment in segments_of(shard)]
    return tasks


def source_rows(planned: PlannedTensor, first: int, count: int) -> Array:
    """Consecutive rows of what a planned tensor is computed from, as an array of their own.

    Args:
        planned: The tensor; FP8 weights are dequantised to float64.
        first: The first row.
        count: How many.
    """
    shape = (count, planned.matrix_shape[1])
    source = planned.source
    if not isinstance(source, StoredTensor):
        return read_rows(source, None, first, shape)
    with Reader(source.path) as reader:
        if isinstance(planned.kernel, Dequantisation):
            grid = planned.kernel.grid(planned)
            lines = shape[1] // max(1, grid.columns)  # of a stacked weight, all are in one row
            rows = np.empty((count * lines, grid.columns), F64)
            return _dequantised(source, grid, reader, first * lines, rows).reshape(shape)
        return read_rows(source, reader, first, shape)


def _dequantised(
    source: StoredTensor, grid: ScaleGrid, reader: Reader, first: int, into: Array
) -> Array:
    shape = (into.shape[0], into.shape[1])
    grid.dequantise(read_rows(source, reader, first, shape), first, into)
    return into


class Worker(OpenFiles):
    """Compares segments, one after the other; a context manager.

    Args:
        queues: The tasks of every queue.
    """

    def __init__(self, queues: Sequence[Sequence[Task]]) -> None:
        super().__init__()
        self._queues = queues
        self._scratch = Scratch()
        self._at: PlannedTensor | None = None
        self._merger: RowMerger | None = None
        self._reach: Reach | None = None
        self._unexplained = 0
        self._scaled: tuple[PlannedTensor, ScaleGrid] | None = None

    def __call__(self, place: Place) -> Part:
        """Compares a segment."""
        task = self._queues[place[0]][place[1]]
        planned = task.pair.planned
        try:
            if planned.updates:
                return self._merged(task)
            if planned.dtype in FLOATS:
                return self._values(task)
        except NonFiniteError as error:
            raise error.restated(f"{planned.name!r}: {error.message}", error.path) from error
        return self._bytes(task)

    def _merged(self, task: Task) -> Part:
        segment, planned, held = task.segment, task.pair.planned, task.pair.held
        merger, reach = self._prepared(planned)
        found, heads, base = Measures(), None, LeafHasher()
        step = merger.preferred_rows()
        for first, count in segment.chunks(step):
            shape = (count, segment.row_elements)
            rows = self._read_source(planned, first, shape)
            if task.pair.hashed:
                base.update(byte_view(rows))
            have = self._read(held, first, shape, "have")
            want = self._scratch.take("want", shape, FLOATS[planned.dtype])
            merger.merge(rows, first, want, self._scratch)
            if first == 0:
                heads = Heads(_digest(want), _digest(have), _digest(rows.astype(want.dtype)))
            judge = None if self._unexplained > _HOPELESS else reach
            part = compare_merged(rows, first, want, have, judge, self._scratch)
            self._unexplained += part.unexplained
            found += part
        return Part(found, heads, tuple(base.leaves()))

    def _values(self, task: Task) -> Part:
        segment, planned, held = task.segment, task.pair.planned, task.pair.held
        found, heads = Measures(), None
        dtype = FLOATS[planned.dtype]
        columns = segment.row_elements
        for first, count in segment.chunks(max(1, _CHUNK_BYTES // dtype.itemsize // columns)):
            rows = self._read_source(planned, first, (count, columns))
            have = self._read(held, first, (count, columns), "have")
            want = rows
            if rows.dtype != dtype:
                want = self._scratch.take("want", rows.shape, dtype)
                cast_rows(rows, dtype, want, self._scratch)
            if first == 0:
                heads = Heads(_digest(want), _digest(have))
            found += compare_chunk(want, have, first * columns)
        return Part(found, heads)

    def _bytes(self, task: Task) -> Part:
        """Compares a tensor of another dtype, a byte at a time."""
        segment, source, held = task.segment, task.pair.planned.source, task.pair.held
        assert isinstance(source, StoredTensor)
        assert isinstance(held, StoredTensor)
        wrong = 0
        for first, count in segment.chunks(_CHUNK_BYTES):
            want = self._scratch.take("want", (count,), np.dtype(np.uint8))
            have = self._scratch.take("have", (count,), np.dtype(np.uint8))
            self.reader(source.path).read_into(byte_view(want), source.offset + first)
            self.reader(held.path).read_into(byte_view(have), held.offset + first)
            if not np.array_equal(want, have):
                wrong += int(np.count_nonzero(want != have))
        found = Measures(elements=segment.rows, differing=wrong, wrong=wrong, beyond=wrong)
        return Part(found)

    def _prepared(self, planned: PlannedTensor) -> tuple[RowMerger, Reach]:
        """The merger of the weight that this worker is at; the one before is dropped first."""
        if self._at is not planned or self._merger is None or self._reach is None:
            self._merger = self._reach = None
            stages = stages_of(planned)
            source = FLOATS.get(planned.source.dtype, F64)  # dequantised where it is none
            target = FLOATS[planned.dtype]
            with naming_block(planned):
                self._merger = RowMerger(stages, planned.matrix_shape, source, target)
            self._reach = Reach(stages, target)
            self._at, self._unexplained = planned, 0
        return self._merger, self._reach

    def _read_source(self, planned: PlannedTensor, first: int, shape: tuple[int, int]) -> Array:
        """Rows of what a planned tensor is computed from, dequantised where that is FP8."""
        if not isinstance(planned.kernel, Dequantisation):
            return self._read(planned.source, first, shape, "rows")
        if self._scaled is None or self._scaled[0] is not planned:
            self._scaled = planned, planned.kernel.grid(planned)
        rows = self._scratch.take("rows", shape, F64)
        assert isinstance(planned.source, StoredTensor)
        reader = self.reader(planned.source.path)
        return _dequantised(planned.source, self._scaled[1], reader, first, rows)

    def _read(self, tensor: Tensor, first: int, shape: tuple[int, int], use: str) -> Array:
        if not isinstance(tensor, StoredTensor):
            return read_rows(tensor, None, first, shape)
        into = self._scratch.take(use, shape, FLOATS[tensor.dtype])
        return read_rows(tensor, self.reader(tensor.path), first, shape, into)


def _digest(rows: Array) -> bytes:
    head = np.ascontiguousarray(rows.reshape(-1)[: _HEAD // rows.dtype.itemsize])
    return blake3.blake3(byte_view(head)).digest(16)


def like(planned: PlannedTensor, dtype: str) -> PlannedTensor:
    """A planned tensor in another dtype; a copy of another dtype is a cast."""
    if dtype == planned.dtype:
        return planned
    action = Action.CAST if planned.action is Action.COPY else planned.action
    return replace(planned, dtype=dtype, action=action)


def comparable(planned: PlannedTensor, held: Tensor) -> bool:
    """Whether two tensors can be compared number by number, or byte by byte."""
    numbers = planned.dtype in FLOATS and held.dtype in FLOATS
    return planned.shape == held.shape and (numbers or planned.dtype == held.dtype)
