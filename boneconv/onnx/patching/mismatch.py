"""Saying how a graph differs from the base: which tensor first, and what is there in its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NoReturn

from boneconv.dtypes import FLOATS
from boneconv.engine.plan import PlannedTensor
from boneconv.errors import BoneconvError, NameMatchError, listing
from boneconv.graphs import Graph, find_weights, missing_weights
from boneconv.io.safetensors import ArrayTensor, Tensor
from boneconv.onnx.patching.values import work_out

__all__ = ["refuse_changed_rest", "refuse_missing"]

_HINT = "Give the graph that was exported from this base, before any adapter was merged"


def refuse_missing(
    graph: Graph,
    changed: Sequence[PlannedTensor],
    sought: Mapping[str, Tensor],
    missing: Sequence[str],
) -> NoReturn:
    """Raises NameMatchError for tensors that the graph does not hold as the base has them."""
    first = missing[0]
    by_name = {tensor.name: tensor for tensor in changed}
    if first in by_name and _is_merged(graph, by_name[first]):
        raise NameMatchError(
            f"the graph is merged already: {first!r} has the adapter's values in it",
            path=graph.path,
            hint=_HINT,
        )
    beside = closest_initializer(graph, first, sought[first].shape)
    found = None if beside is None else f"other values in {listing([beside])}"
    if len(missing) == len(sought):
        message = f"the graph is not of this base: none of {len(sought)} tensors that the adapter"
        message += f" changes is in it, {first!r} to begin with"
    else:
        message = f"the graph is of this base in part: {first!r} is not in it"
        rest = list(missing[1:])
        message += f", nor {listing(rest)}" if rest else ""
        message += f" ({len(missing)} of {len(sought)} tensors that the adapter changes)"
    raise NameMatchError(message, path=graph.path, found=found, hint=_HINT)


def refuse_changed_rest(
    graph: Graph, tensors: Mapping[str, Tensor], adapted: Collection[str]
) -> None:
    """Raises NameMatchError where a matrix that no adapter touches has other values in the graph.

    A graph need not hold all of a base: a matrix that is missing counts only where the graph has,
    under its name, another one of its shape.
    """
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in adapted and len(tensor.shape) > 1 and tensor.dtype in FLOATS
    }
    for name in missing_weights(graph, rest):
        beside = closest_initializer(graph, name, rest[name].shape)
        if beside is not None:
            raise NameMatchError(
                f"the graph is of this base in part: {name!r} has other values in it",
                path=graph.path,
                found=f"in {listing([beside])}",
                hint=_HINT,
            )


def closest_initializer(graph: Graph, name: str, shape: tuple[int, ...]) -> str | None:
    """The initializer that has a tensor's name, or its module's, and its shape or the transposed.

    Names are compared from their end: graphs lack prefixes, or have more.
    """
    module = name.rpartition(".")[0]
    for each in graph.initializers.values():
        if each.shape not in (shape, shape[::-1]):
            continue
        modules = {use.module for use in graph.uses.get(each.name, ())}
        if _same_end(each.name, name) or any(_same_end(scope, module) for scope in modules):
            return each.name
    return None


def _same_end(one: str, other: str) -> bool:
    """Whether one of two dotted names is the end of the other, two segments long at least."""
    mine, theirs = one.split("."), other.split(".")
    length = min(len(mine), len(theirs))
    return length > 1 and mine[-length:] == theirs[-length:]


def _is_merged(graph: Graph, tensor: PlannedTensor) -> bool:
    """Whether the graph holds what the adapter makes of a tensor."""
    for dtype, _ in Counter(each.dtype for each in graph.initializers.values()).most_common():
        try:
            values = work_out(tensor, dtype).array.reshape(tensor.shape)
            found = find_weights(graph, {tensor.name: ArrayTensor(tensor.name, values)})
        except BoneconvError:
            continue
        if found[tensor.name]:
            return True
    return False
