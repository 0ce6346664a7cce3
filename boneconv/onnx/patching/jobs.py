"""What has to be written where: the adapters' tensors, placed in a graph.

Every tensor that the adapters change gets its places in the graph, or the graph is refused with the
first one that has none. A tied embedding whose head goes its own way from now on is told from the
head by the nodes that read it: `Gather` looks embeddings up, everything else is the head.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from boneconv.dtypes import FLOATS
from boneconv.engine.plan import Action, PlannedTensor
from boneconv.errors import FormatError, NameMatchError, ShapeError, UsageError, listing
from boneconv.graphs import Graph, Placement, Use, find_weights
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.safetensors import StoredTensor
from boneconv.onnx.patching.mismatch import refuse_changed_rest, refuse_missing
from boneconv.planning import MergePlan

__all__ = ["Job", "is_lookup", "plan_jobs"]

_OTHERWISE = "Leave out --graph: the merged model is traced then"
_LOOKUPS = ("Gather", "com.microsoft.EmbedLayerNormalization")
#: Operators that only change how a tensor is seen on its way to the one that uses it.
_VIEWS = ("Transpose", "Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze")
_DEEPEST = 8


@dataclass(frozen=True)
class Job:
    """New values of a tensor, and where they go.

    Attributes:
        planned: The tensor, as a merge would write it.
        places: Where its values are overwritten.
        apart: Initializers that embedding and head share: the head gets one of its own.
    """

    planned: PlannedTensor
    places: tuple[Placement, ...]
    apart: tuple[Placement, ...] = ()


def plan_jobs(graph: Graph, base: Checkpoint, plan: MergePlan) -> list[Job]:
    """Places every tensor that the adapters change.

    Raises:
        NameMatchError: A tensor is not in the graph, or it is not clear where.
        ShapeError: A tensor changes its shape, which a graph cannot follow.
        FormatError: A tensor holds integers.
        UsageError: What is asked for needs another graph.
    """
    changed = [
        tensor
        for action in (Action.MERGE, Action.REPLACE, Action.ADD)
        for tensor in plan.plan.by_action(action)
    ]
    order = {tensor.name: number for number, tensor in enumerate(plan.plan.tensors)}
    changed.sort(key=lambda tensor: order[tensor.name])
    for tensor in changed:
        _check_kind(tensor, base, plan, graph)
    added = {t.name: _tied_to(t, plan, graph) for t in changed if t.name not in base.tensors}
    sought = {name: base.tensors[name] for name in _sought(changed, added)}
    found = find_weights(graph, base.tensors, sought)
    missing = [name for name in sought if not found[name]]
    if missing:
        refuse_missing(graph, changed, sought, missing)
    refuse_changed_rest(graph, base.tensors, sought)
    _check_heads(graph, added)
    jobs = [_job(graph, tensor, added, found) for tensor in changed]
    _check_apart(graph, jobs)
    return jobs


def _job(
    graph: Graph,
    tensor: PlannedTensor,
    added: Mapping[str, str],
    found: Mapping[str, Sequence[Placement]],
) -> Job:
    """A tensor's job: of what embedding and head share, each takes what its own nodes read."""
    if tensor.name in added:
        source = added[tensor.name]
        mine = [place for place in found[source] if not _is_looked_up(graph, place)]
        if not mine:
            raise NameMatchError(
                f"{tensor.name!r} has no place in the graph, which uses {source!r} as an embedding "
                "alone",
                path=graph.path,
                hint=_OTHERWISE,
            )
        shared = [place for place in mine if _is_looked_up(graph, place, any_use=True)]
        return Job(tensor, tuple(p for p in mine if p not in shared), tuple(shared))
    places = found[tensor.name]
    if tensor.name in added.values():
        places = [place for place in places if _is_looked_up(graph, place, any_use=True)]
    return Job(tensor, tuple(places))


def _sought(changed: Sequence[PlannedTensor], added: Mapping[str, str]) -> list[str]:
    """The base's tensors that have to be found, each once."""
    return list(dict.fromkeys(added.get(tensor.name, tensor.name) for tensor in changed))


def _check_kind(tensor: PlannedTensor, base: Checkpoint, plan: MergePlan, graph: Graph) -> None:
    stored = base.tensors.get(tensor.name)
    if stored is not None and stored.shape != tensor.shape:
        raise ShapeError(
            f"the adapter changes the shape of {tensor.name!r}, and the graph is made for the old",
            path=graph.path,
            expected=list(stored.shape),
            found=list(tensor.shape),
            hint=_OTHERWISE,
        )
    for each in (stored, tensor.source):
        if each is not None and each.dtype not in FLOATS:
            raise FormatError(
                f"{tensor.name!r} has a dtype that no graph's weights have",
                path=each.path if isinstance(each, StoredTensor) else None,
                expected=", ".join(FLOATS),
                found=each.dtype,
                hint=_OTHERWISE,
            )
    if stored is None and plan.accounts.added[tensor.name].beside is None:
        raise NameMatchError(
            f"the adapter adds {tensor.name!r}, which the base does not have: it cannot be found "
            "in a graph by its values",
            path=graph.path,
            hint=_OTHERWISE,
        )


def _tied_to(tensor: PlannedTensor, plan: MergePlan, graph: Graph) -> str:
    """The base's tensor that an added head was tied to."""
    source = plan.accounts.added[tensor.name].beside or ""
    if "embed" in ".".join(tensor.name.split(".")[-2:]):
        raise UsageError(
            f"{tensor.name!r} was tied to {source!r}; which of the graph's embeddings it is "
            "cannot be told",
            path=graph.path,
            hint=_OTHERWISE,
        )
    return source


def _check_heads(graph: Graph, added: Mapping[str, str]) -> None:
    """Raises UsageError where several tensors were tied to one."""
    sources = list(added.values())
    if len(set(sources)) != len(sources):
        raise UsageError(
            f"several tensors were tied to one and go their own ways now: {listing(list(added))}",
            path=graph.path,
            hint=_OTHERWISE,
        )


def _is_looked_up(graph: Graph, place: Placement, *, any_use: bool = False) -> bool:
    """Whether all uses of an initializer, or any, are the lookup of an embedding."""
    looks = [is_lookup(graph, use) for use in graph.uses.get(place.initializer.name, ())]
    return any(look is not False for look in looks) if any_use else all(looks)


def is_lookup(graph: Graph, use: Use, depth: int = 0) -> bool | None:
    """Whether a use ends in the lookup of an embedding; None where it ends in something else too.

    Views on the way, such as a transposition, are followed.
    """
    if use.op in _VIEWS and use.index == 0 and depth < _DEEPEST:
        ends = {
            is_lookup(graph, later, depth + 1)
            for output in use.outputs
            for later in graph.uses.get(output, ())
        }
        return ends.pop() if len(ends) == 1 else None
    return use.op in _LOOKUPS


def _check_apart(graph: Graph, jobs: Sequence[Job]) -> None:
    """Raises where two tensors would be written to one place."""
    written: dict[str, list[tuple[str, Placement]]] = {}
    for job in jobs:
        for place in job.places:
            others = written.setdefault(place.initializer.name, [])
            for name, other in others:
                if place.overlaps(other):
                    raise NameMatchError(
                        f"{name!r} and {job.planned.name!r} have one place in the graph, "
                        f"{listing([place.initializer.name])}",
                        path=graph.path,
                        hint=_OTHERWISE,
                    )
            others.append((job.planned.name, place))
    _check_bytes(graph, set(written))


def _check_bytes(graph: Graph, written: Collection[str]) -> None:
    """Raises where an initializer that is written shares its bytes with another."""
    ranges = sorted(
        (str(each.path), each.offset, each.offset + each.nbytes, each.name)
        for each in graph.initializers.values()
        if each.values is None and each.nbytes
    )
    for (path, _, end, name), (other_path, start, _, other) in pairwise(ranges):
        if path == other_path and start < end and {name, other} & set(written):
            raise NameMatchError(
                f"the graph's {listing([name, other])} share their bytes",
                path=graph.path,
                hint="Save the graph anew, each weight with bytes of its own, or leave out --graph",
            )
