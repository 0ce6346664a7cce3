"""Every weight of the merged checkpoint, found again in a traced graph by its content.

A tracer may fold, fuse or drop a weight without a word. So the graph is read back from its file,
every floating initializer is digested, and each weight is looked up, as it stands or transposed,
after the cast to the graph's dtype. Equal bytes are equal values: there is no tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from boneconv.dtypes import F32, FLOATS, name_of
from boneconv.errors import CheckFailedError, NonFiniteError, listing
from boneconv.graphs import open_graph
from boneconv.io.safetensors import byte_view

__all__ = ["GraphWeights", "check_all_found", "digests"]

#: Reads one weight.
Read = Callable[[], NDArray[Any]]


class GraphWeights:
    """The float initializers that some node of a graph reads, by content.

    One of them is in memory at a time.

    Args:
        path: The graph, its external data beside it.
    """

    def __init__(self, path: Path) -> None:
        graph = open_graph(path)
        used = (held for held in graph.initializers.values() if graph.uses.get(held.name))
        self._digests = {_digest(held.read()) for held in used}

    def holds(self, weight: NDArray[Any]) -> bool:
        """Whether an initializer has these values, as they stand or transposed."""
        return not self._digests.isdisjoint(digests(weight))

    def holds_any(self, wanted: Iterable[bytes]) -> bool:
        """The same for `digests` that were worked out before."""
        return not self._digests.isdisjoint(wanted)


def digests(weight: NDArray[Any]) -> tuple[bytes, ...]:
    """What a weight's values are looked up by: as they stand and transposed.

    Three axes are a stack of matrices, such as the experts of a layer, each transposed.
    """
    if weight.ndim not in (2, 3):
        return (_digest(weight),)
    return _digest(weight), _digest(weight.swapaxes(-1, -2))


def check_all_found(
    graph: GraphWeights,
    weights: Iterable[tuple[str, Read]],
    converted: Mapping[str, Iterable[bytes]],
    dtype: str,
) -> int:
    """Looks up weights in a graph.

    Args:
        graph: The graph.
        weights: Names and readers of the weights, in their own dtype.
        converted: Names and `digests` of further weights, in the graph's dtype.
        dtype: The graph's dtype, a safetensors name. A weight may also stand there in float32:
            some models compute a few layers so, whatever they are loaded in.

    Returns:
        How many were found: all of them.

    Raises:
        CheckFailedError: The graph lacks some; the first is named.
        NonFiniteError: A weight is too large for the graph's dtype.
    """
    count = len(converted)
    missing = [name for name, wanted in converted.items() if not graph.holds_any(wanted)]
    for name, read in weights:
        count += 1
        weight = read()
        if not (graph.holds(_cast(weight, FLOATS[dtype], name)) or graph.holds(weight.astype(F32))):
            missing.append(name)
    if missing:
        raise CheckFailedError(
            f"the traced graph does not hold the weight {missing[0]!r}: it was folded into "
            "others, fused or lost",
            expected=f"all {count} weights",
            found=f"all but {len(missing)}: {listing(missing)}",
            hint="Patch a graph that exists with --graph, or report the architecture",
        )
    return count


def _cast(weight: NDArray[Any], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        cast = weight.astype(dtype)
    if not np.isfinite(cast).all():
        raise NonFiniteError(
            f"the weight {name!r} does not fit the graph's dtype",
            found=f"values up to {np.abs(weight.astype(np.float64)).max():.4g}",
            hint="Take --dtype float32",
        )
    return cast


def _digest(array: NDArray[Any]) -> bytes:
    """By dtype and values in row order; a weight may be reshaped on the way to a graph."""
    head = name_of(array.dtype).encode()
    return blake3(head).update(byte_view(np.ascontiguousarray(array))).digest()
