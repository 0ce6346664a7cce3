"""Telling equal weights apart by what the exporter wrote beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from boneconv.errors import NameMatchError, listing
from boneconv.graphs.model import Graph
from boneconv.graphs.placement import Placement

__all__ = ["settle_ties"]

_Places = Mapping[str, Sequence[Placement]]


def settle_ties(graph: Graph, found: _Places, wanted: set[str]) -> dict[str, list[Placement]]:
    """Gives every place to one tensor.

    A place that several tensors equal belongs to the one whose name is closest to the module that
    the exporter noted at the nodes that read it (``pkg.torch.onnx.name_scopes``), or, where that
    does not decide, to the initializer's name.

    Args:
        graph: The graph.
        found: For each tensor, the places that hold its values.
        wanted: The tensors that matter: where none of these equals a place, nobody has to decide.

    Raises:
        NameMatchError: Nothing tells two equal tensors, or the two orientations of one, apart.
    """
    settled: dict[str, list[Placement]] = {}
    for place, names in _by_place(found):
        if len(names) == 1:
            settled.setdefault(names[0], []).append(place)
        elif wanted & set(names):
            settled.setdefault(_owner(graph, place, names), []).append(place)
    for name, places in settled.items():
        if name in wanted:
            _check_apart(graph, name, places)
    return settled


def _by_place(found: _Places) -> list[tuple[Placement, list[str]]]:
    owners: dict[tuple[str, bool, int, int, tuple[int, int]], tuple[Placement, list[str]]] = {}
    for name, places in found.items():
        for place in places:
            key = (place.initializer.name, place.transposed, place.row, place.column, place.shape)
            owners.setdefault(key, (place, []))[1].append(name)
    return list(owners.values())


def _owner(graph: Graph, place: Placement, names: Sequence[str]) -> str:
    initializer = place.initializer.name
    modules = [use.module for use in graph.uses.get(initializer, ()) if use.module]
    for labels in (modules, [initializer]):
        ranked = sorted(((max_closeness(name, labels), name) for name in names), reverse=True)
        if ranked[0][0] > 0 and ranked[0][0] > ranked[1][0]:
            return ranked[0][1]
    raise NameMatchError(
        f"the base's tensors {listing(list(names))} are equal, and the graph does not say which "
        f"of them its {listing([initializer])} is",
        path=graph.path,
        hint="Leave out --graph: a traced graph has the merged weights from the start",
    )


def max_closeness(name: str, labels: Sequence[str]) -> int:
    """How close a tensor's name is to the closest of some labels; 0 where none is close."""
    return max((_closeness(_segments(name), _segments(label)) for label in labels), default=0)


def _segments(name: str) -> list[str]:
    return [part for part in re.split(r"[./:]+", name) if part]


def _closeness(name: Sequence[str], label: Sequence[str]) -> int:
    """The length of the longest common subsequence of segments; 0 where the numbers differ."""
    if _numbers(name) != _numbers(label):
        return 0
    lengths = [0] * (len(label) + 1)
    for mine in name:
        previous = 0
        for i, other in enumerate(label):
            previous, lengths[i + 1] = (
                lengths[i + 1],
                previous + 1 if mine == other else max(lengths[i], lengths[i + 1]),
            )
    return lengths[-1]


def _numbers(segments: Sequence[str]) -> list[str]:
    return [part for part in segments if part.isdigit()]


def _check_apart(graph: Graph, name: str, places: Sequence[Placement]) -> None:
    """Raises NameMatchError where a tensor lies at two places that overlap."""
    for number, place in enumerate(places):
        for other in places[:number]:
            if place.overlaps(other):
                raise NameMatchError(
                    f"{name!r} looks the same at two overlapping places, or transposed, in the "
                    f"graph's {listing([place.initializer.name])}",
                    path=graph.path,
                    hint="Leave out --graph: a traced graph has the merged weights from the start",
                )
