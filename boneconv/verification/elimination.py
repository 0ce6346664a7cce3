"""Which initializer a weight must be in when its values are nowhere: by name, else the nearest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from boneconv.graphs import Graph, Initializer, Placement, matrix_shape
from boneconv.io.safetensors import Tensor
from boneconv.kernels.stage import Array
from boneconv.verification.samples import tensor_rows

__all__ = ["nearest"]

_WIDTH = 64
_ROWS = 3
_NEAR = 0.9  # of the norm: two unrelated lines are 1.4 apart


@dataclass(frozen=True)
class _Guess:
    """A place where a tensor may be: named alike or not, and how far its first values are off."""

    other_name: bool
    distance: float
    tensor: str
    place: Placement


def nearest(
    graph: Graph, missing: Mapping[str, Tensor], taken: Sequence[Placement]
) -> dict[str, tuple[Placement, ...]]:
    """Gives each missing tensor a free place of its shape, the best pairs first.

    Args:
        graph: The graph.
        missing: Expected tensors that were not found.
        taken: Where the others are.

    Returns:
        Places by the tensor's name; tensors for which there is no free place are left out.
    """
    held = [each for each in graph.initializers.values() if graph.uses.get(each.name)]
    free = _Free(held, taken)
    guesses = [
        _Guess(not _alike(name, place.initializer.name), _distance(tensor, place), name, place)
        for name, tensor in missing.items()
        for place in (
            *free.places(matrix_shape(tensor.shape), len(tensor.shape) < 2),
            *free.slices(tensor),
        )
    ]
    guesses.sort(key=lambda guess: (guess.other_name, guess.distance))
    found: dict[str, tuple[Placement, ...]] = {}
    given: list[Placement] = []
    for guess in guesses:
        if guess.tensor in found or any(guess.place.overlaps(other) for other in given):
            continue
        found[guess.tensor] = (guess.place,)
        given.append(guess.place)
    return found


class _Free:
    """The free places of a shape: whole initializers, and gaps in packed ones."""

    def __init__(self, held: Iterable[Initializer], taken: Sequence[Placement]) -> None:
        self._taken: dict[str, list[Placement]] = {}
        for place in taken:
            self._taken.setdefault(place.initializer.name, []).append(place)
        self._held = list(held)

    def places(self, shape: tuple[int, int], is_vector: bool) -> Iterator[Placement]:
        """Those of one shape ``[out, in]``."""
        for initializer in self._held:
            used = self._taken.get(initializer.name, [])
            if used:
                yield from _gaps(initializer, used, shape)
                continue
            if (len(initializer.shape) < 2) != is_vector:
                continue
            if initializer.matrix_shape == shape:
                yield Placement(initializer, False, 0, 0, shape)
            if initializer.matrix_shape == shape[::-1] and not is_vector:
                yield Placement(initializer, True, 0, 0, shape)

    def slices(self, tensor: Tensor) -> Iterator[Placement]:
        """For each packed initializer, the free slice that begins most nearly as a matrix does."""
        if len(tensor.shape) < 2:
            return
        shape = matrix_shape(tensor.shape)
        for initializer in self._held:
            used = self._taken.get(initializer.name, [])
            for place in _nearest_slices(initializer, tensor, shape):
                if not any(place.overlaps(other) for other in used):
                    yield place


def _nearest_slices(
    initializer: Initializer, tensor: Tensor, shape: tuple[int, int]
) -> Iterator[Placement]:
    height, width = initializer.matrix_shape
    for turned in (False, True):
        rows, columns = shape[::-1] if turned else shape
        if columns == width and rows < height:
            lines = initializer.block(0, 0, height - rows + 1, min(_WIDTH, width))
            start = _nearest_line(lines, _edge(tensor, shape, column=turned))
            if start is not None:
                yield Placement(initializer, turned, start, 0, shape)
        elif rows == height and columns < width:
            lines = initializer.block(0, 0, min(_WIDTH, height), width - columns + 1).T
            start = _nearest_line(lines, _edge(tensor, shape, column=not turned))
            if start is not None:
                yield Placement(initializer, turned, 0, start, shape)


def _edge(tensor: Tensor, shape: tuple[int, int], *, column: bool) -> Array:
    """The first values of a matrix's first row or column."""
    if column:
        lines = tensor_rows(tensor, 0, min(_WIDTH, shape[0]), shape[1])[:, 0]
    else:
        lines = tensor_rows(tensor, 0, 1, shape[1])[0, :_WIDTH]
    return np.asarray(lines.astype(np.float64))


def _nearest_line(lines: Array, wanted: Array) -> int | None:
    """The line that is nearest to the wanted one; None where none is near."""
    with np.errstate(all="ignore"):
        distance = np.linalg.norm(lines.astype(np.float64) - wanted, axis=1)
    best = int(np.argmin(np.where(np.isnan(distance), np.inf, distance)))
    return best if distance[best] < _NEAR * np.linalg.norm(wanted) else None


def _gaps(
    initializer: Initializer, used: Sequence[Placement], shape: tuple[int, int]
) -> Iterator[Placement]:
    """Free slices of a packed initializer, turned as its other slices are."""
    height, width = initializer.matrix_shape
    turned = used[0].transposed
    rows, columns = shape[::-1] if turned else shape
    if columns == width and rows < height:
        starts = [0, *(place.row + place.region[0] for place in used)]
        places = [Placement(initializer, turned, s, 0, shape) for s in starts if s + rows <= height]
    elif rows == height and columns < width:
        starts = [0, *(place.column + place.region[1] for place in used)]
        places = [
            Placement(initializer, turned, 0, s, shape) for s in starts if s + columns <= width
        ]
    else:
        return
    for place in places:
        if not any(place.overlaps(other) for other in used):
            yield place


def _alike(tensor: str, initializer: str) -> bool:
    one, other = f".{tensor}", f".{initializer}"
    return one.endswith(other) or other.endswith(one)


def _distance(tensor: Tensor, place: Placement) -> float:
    """How far some first values are off, relative to their size."""
    want, have = _corner(tensor), _held_corner(place)
    with np.errstate(all="ignore"):
        off = float(np.linalg.norm(want - have))
        size = float(np.linalg.norm(want))
    return off / size if size > 0 and np.isfinite(off) else np.inf


def _corner(tensor: Tensor) -> Array:
    rows, columns = matrix_shape(tensor.shape)
    found = tensor_rows(tensor, 0, min(_ROWS, rows), columns)
    return np.asarray(found[:, :_WIDTH].astype(np.float64))


def _held_corner(place: Placement) -> Array:
    rows, columns = min(_ROWS, place.shape[0]), min(_WIDTH, place.shape[1])
    region = (columns, rows) if place.transposed else (rows, columns)
    found = place.initializer.block(place.row, place.column, *region)
    return np.asarray((found.T if place.transposed else found).astype(np.float64))
