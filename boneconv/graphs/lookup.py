"""Finding weights in a graph by their content.

The names of a graph's initializers say little: exporters fold, transpose, pack and rename them.
Their values stay those of the checkpoint, rounded to the graph's dtype. The first eight values of a
weight's first row are looked up among the rows and columns of the initializers; where they stand,
all values are compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boneconv.dtypes import FLOATS
from boneconv.graphs.initializers import Initializer
from boneconv.graphs.model import Graph
from boneconv.graphs.placement import Placement, bits, cast
from boneconv.graphs.ties import settle_ties
from boneconv.io.files import Reader
from boneconv.io.safetensors import ArrayTensor, Tensor, byte_view

__all__ = ["find_weights", "matrix_shape", "missing_weights"]

Array = NDArray[Any]

_KEY = 8
#: Rows of more bytes are read at their heads alone, shorter ones as a whole.
_LONG_ROW = 16 * 1024
_CHUNK_BYTES = 4 * 1024 * 1024


def find_weights(
    graph: Graph, tensors: Mapping[str, Tensor], wanted: Collection[str] | None = None
) -> dict[str, tuple[Placement, ...]]:
    """Finds the tensors of a checkpoint among the initializers that some node reads.

    A tensor is sought as the matrix ``[out, the rest]``, a vector as one row. It is found as it is,
    transposed (matrices alone), or, where it is nowhere whole, as a slice along either axis of a
    packed initializer. Memory is bounded by twice the largest tensor sought.

    Args:
        graph: The graph.
        tensors: The checkpoint's tensors by name. Those of float dtypes that are not wanted serve
            to tell equal ones apart.
        wanted: Names of those to find; by default all of a float dtype.

    Returns:
        For every wanted name, where it lies: several placements where the graph holds it several
        times (a tied embedding and its transposed head), none where it is not in the graph.

    Raises:
        NameMatchError: Two tensors of the checkpoint, or both orientations of one, are equal, and
            neither the exporter's metadata nor the names say which one an initializer is.
    """
    floats = {name: tensor for name, tensor in tensors.items() if tensor.dtype in FLOATS}
    names = list(floats) if wanted is None else [name for name in floats if name in set(wanted)]
    sought = {name: _Sought(name, floats[name]) for name in names if floats[name].nbytes}
    placed = _find(graph, sought, _rivals(floats, sought))
    settled = settle_ties(graph, placed, set(names))
    return {name: tuple(settled.get(name, ())) for name in names}


def missing_weights(graph: Graph, tensors: Mapping[str, Tensor]) -> list[str]:
    """The tensors of a float dtype that lie nowhere in a graph; equal ones need not be told apart.

    Args:
        graph: The graph.
        tensors: The tensors by name, sought as by `find_weights`.
    """
    sought = {
        name: _Sought(name, tensor)
        for name, tensor in tensors.items()
        if tensor.dtype in FLOATS and tensor.nbytes
    }
    placed = _find(graph, sought, {})
    return [name for name in sought if name not in placed]


def _find(
    graph: Graph, sought: Mapping[str, _Sought], rivals: Mapping[str, _Sought]
) -> dict[str, list[Placement]]:
    """The places of what is sought, and of its rivals: whole initializers first, then slices."""
    held = [each for each in graph.initializers.values() if graph.uses.get(each.name)]
    placed = _find_whole(held, {**sought, **rivals})
    missing = {name: each for name, each in sought.items() if name not in placed}
    if missing:
        placed |= _find_packed(held, {**missing, **_alike(rivals, missing)}, placed)
    return placed


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor's shape as a matrix: ``[out, the rest]``, a vector is one row."""
    if len(shape) < 2:
        return 1, int(np.prod(shape))
    return shape[0], int(np.prod(shape[1:]))


class _Sought:
    """A tensor that is looked for."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.is_vector = len(tensor.shape) < 2
        self.shape = matrix_shape(tensor.shape)
        self._head = self._read(0, min(_KEY, self.shape[1]))
        self._keys: dict[str, Array] = {}

    def key(self, dtype: str) -> Array:
        """The first values of its first row in a dtype, as bits."""
        if dtype not in self._keys:
            self._keys[dtype] = bits(cast(self._head, dtype))
        return self._keys[dtype]

    def whole(self, dtype: str) -> Array:
        """All values ``[out, in]`` in a dtype."""
        return cast(self._read(0, self.shape[0] * self.shape[1]), dtype).reshape(self.shape)

    def start(self) -> tuple[tuple[int, ...], bytes]:
        """Shape and first values: what equal tensors have in common."""
        return self.tensor.shape, self.key("F32").tobytes()

    def lies_at(self, place: Placement, cache: _Whole) -> bool:
        return place.holds(cache.get(self, place.initializer.dtype))

    def _read(self, first: int, count: int) -> Array:
        """Some of its values in their own dtype, by their number in row-major order."""
        if isinstance(self.tensor, ArrayTensor):
            return self.tensor.array.reshape(-1)[first : first + count]
        dtype = FLOATS[self.tensor.dtype]
        out: Array = np.empty(count, dtype)
        with Reader(self.tensor.path) as reader:
            reader.read_into(byte_view(out), self.tensor.offset + first * dtype.itemsize)
        return out


class _Whole:
    """The values of the tensor that was compared last, so that several places share one reading."""

    def __init__(self) -> None:
        self._held: tuple[str, str] | None = None
        self._values: Array | None = None

    def get(self, sought: _Sought, dtype: str) -> Array:
        if self._values is None or self._held != (sought.name, dtype):
            self._values = None
            self._values, self._held = sought.whole(dtype), (sought.name, dtype)
        return self._values


def _rivals(floats: Mapping[str, Tensor], sought: Mapping[str, _Sought]) -> dict[str, _Sought]:
    """The other tensors that may equal one that is sought."""
    shapes = {each.tensor.shape for each in sought.values()}
    others = {
        name: _Sought(name, tensor)
        for name, tensor in floats.items()
        if name not in sought and tensor.shape in shapes and tensor.nbytes
    }
    return _alike(others, sought)


def _alike(others: Mapping[str, _Sought], sought: Mapping[str, _Sought]) -> dict[str, _Sought]:
    """Those of some tensors that start as one that is sought."""
    starts = {each.start() for each in sought.values()}
    return {name: each for name, each in others.items() if each.start() in starts}


def _find_whole(
    held: Iterable[Initializer], sought: Mapping[str, _Sought]
) -> dict[str, list[Placement]]:
    """Tensors that are a whole initializer, as it is or transposed."""
    starts = _Starts(sought.values())
    candidates: dict[str, list[Placement]] = {}
    for initializer in held:
        height, width = initializer.matrix_shape
        is_vector = len(initializer.shape) < 2
        if starts.has((height, width)):
            row = initializer.block(0, 0, 1, min(_KEY, width))
            for each in starts.at(initializer.dtype, (height, width), row):
                if each.is_vector == is_vector or height == 1:
                    place = Placement(initializer, False, 0, 0, each.shape)
                    candidates.setdefault(each.name, []).append(place)
        if not is_vector and initializer.matrix_shape != (1, 1) and starts.has((width, height)):
            column = initializer.block(0, 0, min(_KEY, height), 1)
            for each in starts.at(initializer.dtype, (width, height), column):
                if not each.is_vector:
                    place = Placement(initializer, True, 0, 0, each.shape)
                    candidates.setdefault(each.name, []).append(place)
    return _compared(candidates, sought)


class _Starts:
    """Tensors by their shape and first values."""

    def __init__(self, sought: Iterable[_Sought]) -> None:
        self._sought = list(sought)
        self._shapes = {each.shape for each in self._sought}
        self._known: dict[str, dict[tuple[tuple[int, int], bytes], list[_Sought]]] = {}

    def has(self, shape: tuple[int, int]) -> bool:
        """Whether any tensor has a shape."""
        return shape in self._shapes

    def at(self, dtype: str, shape: tuple[int, int], values: Array) -> list[_Sought]:
        """The tensors of a shape that start with some values in a dtype."""
        if dtype not in self._known:
            known = self._known[dtype] = {}
            for each in self._sought:
                known.setdefault((each.shape, each.key(dtype).tobytes()), []).append(each)
        return self._known[dtype].get((shape, values.tobytes()), [])


def _find_packed(
    held: Iterable[Initializer],
    sought: Mapping[str, _Sought],
    taken: Mapping[str, list[Placement]],
) -> dict[str, list[Placement]]:
    """Tensors that are a slice of a packed initializer along one of its axes."""
    whole = {place.initializer.name for places in taken.values() for place in places}
    candidates: dict[str, list[Placement]] = {}
    for initializer in held:
        if initializer.name in whole:
            continue
        edges = _Edges(initializer)
        for each in sought.values():
            for place in edges.candidates(each):
                candidates.setdefault(each.name, []).append(place)
    return _compared(candidates, sought)


def _compared(
    candidates: Mapping[str, list[Placement]], sought: Mapping[str, _Sought]
) -> dict[str, list[Placement]]:
    """The candidates that hold all values of their tensor."""
    cache = _Whole()
    found = {
        name: [place for place in places if sought[name].lies_at(place, cache)]
        for name, places in candidates.items()
    }
    return {name: places for name, places in found.items() if places}


class _Edges:
    """The heads of all rows and columns of an initializer, read when they are first needed."""

    def __init__(self, initializer: Initializer) -> None:
        self._initializer = initializer
        self._height, self._width = initializer.matrix_shape
        self._rows: Array | None = None
        self._columns: Array | None = None

    def candidates(self, sought: _Sought) -> Iterator[Placement]:
        """The slices that start as a tensor does."""
        out, width_in = sought.shape
        height, width = self._height, self._width
        length = min(_KEY, width_in)
        if sought.is_vector and height != 1:
            return
        key = sought.key(self._initializer.dtype)
        if width_in == width and out < height:
            for row in _matches(self.row_heads()[: height - out + 1, :length], key):
                yield Placement(self._initializer, False, row, 0, sought.shape)
        if out == height and width_in < width:
            windows = _windows(self.column_heads()[0, : width - width_in + length], length)
            for column in _matches(windows, key):
                yield Placement(self._initializer, False, 0, column, sought.shape)
        if sought.is_vector or sought.shape == (1, 1):
            return
        if width_in == height and out < width:
            heads = self.column_heads()[:length, : width - out + 1].T
            for column in _matches(heads, key):
                yield Placement(self._initializer, True, 0, column, sought.shape)
        if out == width and width_in < height:
            windows = _windows(self.row_heads()[: height - width_in + length, 0], length)
            for row in _matches(windows, key):
                yield Placement(self._initializer, True, row, 0, sought.shape)

    def column_heads(self) -> Array:
        """The first values of all columns: ``[up to 8, width]``, as bits."""
        if self._columns is None:
            self._columns = bits(self._initializer.rows(0, min(_KEY, self._height)))
        return self._columns

    def row_heads(self) -> Array:
        """The first values of all rows: ``[height, up to 8]``, as bits."""
        if self._rows is None:
            held, width = self._initializer, min(_KEY, self._width)
            if self._width * held.itemsize >= _LONG_ROW:
                self._rows = bits(held.block(0, 0, self._height, width))
            else:
                step = max(1, _CHUNK_BYTES // max(1, self._width * held.itemsize))
                parts = [
                    held.rows(first, min(step, self._height - first))[:, :width].copy()
                    for first in range(0, self._height, step)
                ]
                self._rows = bits(np.concatenate(parts))
        return self._rows


def _windows(line: Array, length: int) -> Array:
    """All runs of some values of a line: ``[n, length]``."""
    return np.lib.stride_tricks.sliding_window_view(line, length)


def _matches(heads: Array, key: Array) -> list[int]:
    """The rows of heads that equal a key."""
    (first,) = np.nonzero(heads[:, 0] == key[0])
    return [int(i) for i in first if np.array_equal(heads[i], key)]
