"""Verifying an ONNX graph: its weights are found by content, or else by what they come closest to.

The canonical merged weights are computed once, in the graph's dtype, into a temporary folder, and
looked up among the initializers with the untouched ones. What is found is right, bit by bit. What
is not is looked up as the base has it, then by its name, then as the free initializer, or the free
part of a packed one, whose first values are nearest; so that a spoiled weight is measured against
the initializer that it must be in.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from boneconv.dtypes import FLOATS, cli_name
from boneconv.engine.plan import Action, PlannedShard
from boneconv.engine.progress import Progress
from boneconv.engine.stream import ShardDigests, stream
from boneconv.errors import DiskFullError, FormatError, NameMatchError, listing
from boneconv.graphs import Graph, Placement, find_weights, open_graph, refuse_quantised
from boneconv.io.hub import Source
from boneconv.io.safetensors import ArrayTensor, StoredTensor, Tensor
from boneconv.planning.plan import MergePlan, Options, PathLike, plan_located, stacks
from boneconv.verification.candidate import read_record
from boneconv.verification.checkpoint import verify_tensors
from boneconv.verification.elimination import nearest
from boneconv.verification.fingerprints import check_base
from boneconv.verification.report import (
    CandidateKind,
    FileReport,
    Finding,
    Report,
    Severity,
    Status,
)
from boneconv.verification.settings import check_record, infer, rule_of
from boneconv.verification.summary import ordered_findings, totals_of

__all__ = ["verify_graph"]

_AT_RUN_TIME = "runtime-adapters"
_CHANGED = (Action.MERGE, Action.REPLACE, Action.ADD)


def verify_graph(
    base: Source,
    adapters: Sequence[PathLike],
    candidate: Path,
    *,
    scale: float | None,
    tolerance: str,
    allow_base_mismatch: bool,
    workers: int | None,
    progress: Progress | None,
) -> Report:
    """Holds a graph's weights against base and adapters.

    Args:
        base: The base.
        adapters: The adapters, in order.
        candidate: An ``.onnx`` file, or a folder with one.
        scale: S in ``W + S (W' - W)``; None for what the graph's record says, else 1.
        tolerance: As of `verify`.
        allow_base_mismatch: As of `verify`.
        workers: Workers that compute.
        progress: Is told how far it is.

    Raises:
        FormatError: The graph is malformed or quantised, or takes its adapters when it runs.
        InputError: One of its kinds, for every fault of base and adapters.
        DiskFullError: There is no room for the merged weights.
        MachineError: Reading or writing failed.
    """
    folder = candidate / "onnx" if (candidate / "onnx").is_dir() else candidate
    graph = open_graph(folder if not any(candidate.glob("*.onnx")) else candidate)
    refuse_quantised(graph)
    record = read_record(candidate)
    if record.get("export") == _AT_RUN_TIME:
        raise FormatError(
            "the graph takes its adapters when it runs: its weights are the base's",
            path=candidate,
            hint="Compare its logits, or verify a graph that was exported without runtime adapters",
        )
    rule, numerics = rule_of(tolerance, record)
    dtype = _dtype_of(graph)
    settings = infer(scale, cli_name(dtype), record, {}, {})
    options = Options.parse(
        scale=settings.scale,
        dtype=cli_name(dtype),
        max_shard_size=None,
        card=False,
        workers=workers,
    )
    planned = plan_located(base, stacks(adapters[0], adapters[1:]), options)
    with _merged(planned, options.workers) as merged:
        placed, rest, notes = _place(graph, planned, merged)
    held: dict[str, Tensor] = {}
    place_of: dict[str, str] = {}
    for name, places in placed.items():
        held[name], place_of[name] = _tensor(name, planned, places), _described(places[0])
    kept, absent = _without_absent(planned, held)
    outcome = verify_tensors(kept, held, place_of, rule, workers=workers, progress=progress)
    notes += [*_unused(rest), *absent, *settings.findings]
    notes += check_record(planned, settings.scale, record)
    notes += check_base(planned, outcome.found, record, allowed=allow_base_mismatch)
    tensors = outcome.tensors
    changed = [
        outcome.found[t.name].measures
        for t in tensors
        if str(t.action) in _CHANGED and t.name in outcome.found
    ]
    return Report(
        base=base.given,
        adapters=tuple(source.given for source in planned.adapters),
        candidate=str(candidate),
        kind=CandidateKind.ONNX,
        numerics=numerics,
        tolerance=rule,
        scale=settings.scale,
        dtype=cli_name(dtype),
        tensors=tensors,
        files=_data_files(graph),
        findings=ordered_findings([*outcome.findings, *notes]),
        totals=totals_of(tensors, changed),
    )


def _dtype_of(graph: Graph) -> str:
    """The dtype that most of a graph's weights have."""
    counts: Counter[str] = Counter()
    for each in graph.initializers.values():
        counts[each.dtype] += each.nbytes
    return counts.most_common(1)[0][0] if counts else "F32"


@contextmanager
def _merged(planned: MergePlan, workers: int) -> Iterator[dict[str, StoredTensor]]:
    """The canonical values of all tensors that the adapter changes, in a temporary file."""
    tensors = [t for t in planned.plan.tensors if t.action in _CHANGED and t.dtype in FLOATS]
    shard = PlannedShard.lay_out("merged.safetensors", tensors, {})
    with tempfile.TemporaryDirectory(prefix="boneconv-verify-") as folder:
        path = Path(folder) / shard.name
        if shutil.disk_usage(folder).free < shard.size:
            raise DiskFullError(
                "no room for the merged weights that the graph is compared with",
                path=folder,
                expected=f"{shard.size:,} bytes",
                hint="Set TMPDIR to a folder on a larger disk",
            )

        def finished(shard: PlannedShard, digests: ShardDigests) -> None:
            pass

        stream([shard], lambda _: path, workers=workers, finished=finished)
        yield {
            t.name: StoredTensor(path, t.name, t.dtype, t.shape, shard.offsets[t.name], t.nbytes)
            for t in tensors
        }


def _place(
    graph: Graph, planned: MergePlan, merged: Mapping[str, StoredTensor]
) -> tuple[dict[str, tuple[Placement, ...]], list[str], list[Finding]]:
    """Where each expected tensor is in the graph, the initializers that hold none, and findings."""
    untouched = {
        t.name: t.source
        for t in planned.plan.tensors
        if t.name not in merged and t.dtype in FLOATS and t.source.nbytes
    }
    expected: dict[str, Tensor] = {**merged, **untouched}
    placed = {name: found for name, found in _found(graph, expected).items() if found}
    taken = [place for places in placed.values() for place in places]
    findings = []
    for name, found in _found(graph, _old(planned)).items():
        free = tuple(p for p in found if not any(p.overlaps(other) for other in taken))
        if free and name not in placed:
            placed[name] = free
        elif free:
            text = f"{name} is merged in one place, and the base's in {_described(free[0])}"
            findings.append(Finding(Severity.ERROR, "not-applied", text, (name,)))
    missing = {name: tensor for name, tensor in expected.items() if name not in placed}
    taken = [place for places in placed.values() for place in places]
    placed |= nearest(graph, missing, taken)
    used = {place.initializer.name for places in placed.values() for place in places}
    rest = [
        name
        for name, each in graph.initializers.items()
        if name not in used and graph.uses.get(name) and each.nbytes > each.itemsize
    ]
    return placed, rest, findings


def _old(planned: MergePlan) -> dict[str, Tensor]:
    """What the base holds in place of the tensors that the adapter changes."""
    old: dict[str, Tensor] = {}
    for homes in planned.accounts.homes:
        old |= {stored.name: stored for stored in homes.values()}
    changed = {t.name for t in planned.plan.tensors if t.action in _CHANGED}
    return {name: tensor for name, tensor in old.items() if name in changed}


def _found(graph: Graph, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Placement, ...]]:
    """As `find_weights`; of tensors that nothing tells apart, each is taken to be all of them."""
    try:
        return dict(find_weights(graph, tensors))
    except NameMatchError:
        found: dict[str, tuple[Placement, ...]] = {}
        for name, tensor in tensors.items():
            found |= _alone(graph, name, tensor)
        return found


def _alone(graph: Graph, name: str, tensor: Tensor) -> dict[str, tuple[Placement, ...]]:
    try:
        return dict(find_weights(graph, {name: tensor}))
    except NameMatchError:  # a symmetric matrix: either orientation is right
        return {}


def _tensor(name: str, planned: MergePlan, places: Sequence[Placement]) -> Tensor:
    """What the graph holds, in the shape of the planned tensor."""
    shape = next(t.shape for t in planned.plan.tensors if t.name == name)
    first = places[0]
    initializer = first.initializer
    if initializer.values is None and first.is_whole and not first.transposed:
        return StoredTensor(
            initializer.path, name, initializer.dtype, shape, initializer.offset, initializer.nbytes
        )
    return ArrayTensor(name, first.read().reshape(shape))


def _described(place: Placement) -> str:
    name = place.initializer.name
    if not place.is_whole:
        name += f"[{place.row}:, {place.column}:]"
    return f"{name} (transposed)" if place.transposed else name


def _without_absent(
    planned: MergePlan, held: Mapping[str, Tensor]
) -> tuple[MergePlan, list[Finding]]:
    """The plan without untouched tensors that the graph does not hold: exporters fold or drop them.

    Tensors that the adapter changes stay in it: they must be there.
    """
    gone = [t.name for t in planned.plan.tensors if t.action not in _CHANGED and t.name not in held]
    if not gone:
        return planned, []
    shards = tuple(
        replace(shard, tensors=tuple(t for t in shard.tensors if t.name not in gone))
        for shard in planned.plan.shards
    )
    kept = replace(planned, plan=replace(planned.plan, shards=shards))
    text = f"not in the graph as weights, so not verified: {listing(gone)}"
    return kept, [Finding(Severity.WARNING, "not-in-graph", text, tuple(gone))]


def _unused(rest: Collection[str]) -> list[Finding]:
    if not rest:
        return []
    text = f"initializers that hold no tensor of the model: {listing(list(rest))}"
    return [Finding(Severity.NOTE, "unknown-initializers", text)]


def _data_files(graph: Graph) -> tuple[FileReport, ...]:
    return tuple(FileReport(name, Status.PASS) for name in sorted(graph.data_files))
