"""A graph that serves many adapters: the base's, with inputs for blocks, and a file for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from boneconv.config import Axis, Variant
from boneconv.engine.plan import Update
from boneconv.errors import FormatError, NameMatchError, ShapeError, UsageError, listing
from boneconv.graphs import (
    GRAPH_NAME,
    Graph,
    Placement,
    find_weights,
    open_graph,
    refuse_quantised,
)
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.files import machine_errors
from boneconv.io.safetensors import Tensor
from boneconv.onnx.runtime.files import (
    ADAPTER_SUFFIX,
    RuntimeInputs,
    read_inputs,
    write_adapter_file,
)
from boneconv.onnx.runtime.graph import Slot, add_adapter_inputs
from boneconv.onnx.runtime.products import MERGE_INSTEAD, Place
from boneconv.onnx.runtime.write import check_graph, write_graph
from boneconv.planning.accounts import Strength, settle
from boneconv.planning.config_edits import ConfigEdits

__all__ = ["ADAPTERS", "Bat", "RuntimeSummary", "add_adapter", "export_runtime_adapters"]

#: The folder of the adapter files, beside the graph.
ADAPTERS = "adapters"

#: What to do with BAT adapters: refuse them, or put their activation form in the graph.
Bat = Literal["refuse", "activation"]

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,99})")
_COST = (
    "BAT's activation form, which does twice the work of a plain product while a BAT adapter is "
    "active: measured on SmolLM2-135M, the whole model takes 1.5 to 2 times as long at 1 to 256 "
    "tokens. The rank of the BAT blocks is fixed in the graph."
)


@dataclass(frozen=True)
class RuntimeSummary:
    """What was written.

    Attributes:
        graph: The graph.
        adapters: The adapter files by name.
        modules: How many modules can be adapted.
        version: The number that binds the files to the graph.
    """

    graph: Path
    adapters: Mapping[str, Path]
    modules: int
    version: int


@dataclass(frozen=True)
class _Home:
    """A module that is adapted: its weight in the checkpoint, and each adapter's update."""

    weight: Tensor
    updates: dict[str, Update]


def export_runtime_adapters(
    base: Checkpoint,
    adapters: Mapping[str, Strength],
    graph: Path,
    target: Path,
    *,
    bat: Bat = "refuse",
    note: Callable[[str], None] = lambda _: None,
) -> RuntimeSummary:
    """Writes ``model.onnx`` with its data, and ``adapters/<name>.onnx_adapter``, into a folder.

    Without an adapter, the graph answers as the base's does. Modules that any of the adapters
    changes get an input; see `boneconv.onnx.runtime.names`.

    Args:
        base: The checkpoint that the adapters were made for.
        adapters: The adapters and their strengths, by the names that their files get.
        graph: The base's graph, float, not merged.
        target: A folder that exists.
        bat: Whether BAT adapters are refused, or computed in the activation form.
        note: Is told what the user should know.

    Raises:
        UsageError: A BAT adapter that is to be refused, several ranks of BAT in one module, a
            name that is no file name, an adapter that replaces whole tensors.
        NameMatchError: An adapter's tensor has no home in the base, or a weight of the base none
            in the graph.
        FormatError: The graph is quantised or malformed, or a weight goes into an operator that
            cannot take an adapter.
        ShapeError, NonFiniteError: A block that does not fit.
        CheckFailedError: What was written does not read back, breaks a rule of ONNX's, or does not
            load.
        MachineError: The disk is full or fails.
    """
    _check_names(adapters)
    homes = _homes(base, adapters, note)
    _check_bat(homes, bat, note)
    opened = open_graph(graph)
    refuse_quantised(opened)
    slots = _slots(opened, base, homes)
    model = type(opened.proto)()
    model.CopyFrom(opened.proto)
    add_adapter_inputs(model, slots)
    version = write_graph(opened, model, target)
    inputs = read_inputs(target / GRAPH_NAME, model)
    folder = target / ADAPTERS
    with machine_errors(folder):
        folder.mkdir(exist_ok=True)
    files = {name: folder / f"{name}{ADAPTER_SUFFIX}" for name in adapters}
    for name, path in files.items():
        write_adapter_file(_updates(homes, name), inputs, path)
    if any(block.dtype == "BF16" for block in inputs.blocks.values()):
        note("ONNX Runtime lacks most bfloat16 kernels on the CPU: run this graph on a GPU")
    else:
        check_graph(target / GRAPH_NAME)
    return RuntimeSummary(target / GRAPH_NAME, files, len(homes), version)


def add_adapter(
    base: Checkpoint,
    adapter: Strength,
    graph: Path,
    path: Path,
    *,
    note: Callable[[str], None] = lambda _: None,
) -> RuntimeInputs:
    """Writes one more adapter's file for a graph that `export_runtime_adapters` made.

    Args:
        base: The checkpoint that the adapter was made for, the graph's own.
        adapter: The adapter and its strength.
        graph: The graph with inputs for adapters.
        path: The file to write.
        note: Is told what the user should know.

    Returns:
        The graph's inputs.

    Raises:
        NameMatchError: A module has no input in the graph.
        UsageError, ShapeError, NonFiniteError, FormatError, MachineError: As above.
    """
    inputs = read_inputs(graph, open_graph(graph).proto)
    homes = _homes(base, {"": adapter}, note)
    write_adapter_file(_updates(homes, ""), inputs, path)
    return inputs


def _check_names(adapters: Mapping[str, Strength]) -> None:
    if not adapters:
        raise UsageError("there is no adapter to export")
    wrong = [name for name in adapters if not _NAME.fullmatch(name)]
    if wrong:
        raise UsageError(
            f"adapters' names become file names: {listing(wrong)}",
            expected="letters, digits, '.', '_' and '-'",
        )
    folded = [name.casefold() for name in adapters]
    if len(set(folded)) < len(folded):
        raise UsageError(f"two adapters have one name: {listing(list(adapters))}")


def _homes(
    base: Checkpoint, adapters: Mapping[str, Strength], note: Callable[[str], None]
) -> dict[str, _Home]:
    """The modules that the adapters change, by their names in the checkpoint."""
    homes: dict[str, _Home] = {}
    for name, strength in adapters.items():
        config = None if base.config is None or base.single_file else ConfigEdits(base.config)
        accounts = settle(base, config, [strength])
        plain = [tensor for tensor, each in accounts.added.items() if not each.updates]
        whole = sorted({*accounts.replaced, *plain})
        if whole:
            raise UsageError(
                f"the adapter replaces whole tensors, which cannot be swapped: {listing(whole)}",
                path=strength.adapter.path,
                hint=MERGE_INSTEAD,
            )
        for line in accounts.notes:
            note(line)
        found = {
            tensor: (base.tensors[tensor], updates) for tensor, updates in accounts.updates.items()
        } | {tensor: (each.source, list(each.updates)) for tensor, each in accounts.added.items()}
        for tensor, (weight, updates) in found.items():
            home = homes.setdefault(tensor.removesuffix(".weight"), _Home(weight, {}))
            (home.updates[name],) = updates
    return homes


def _updates(homes: Mapping[str, _Home], name: str) -> dict[str, Update]:
    return {module: home.updates[name] for module, home in homes.items() if name in home.updates}


def _check_bat(homes: Mapping[str, _Home], bat: Bat, note: Callable[[str], None]) -> None:
    updated = {
        (module, name): update.block
        for module, home in homes.items()
        for name, update in home.updates.items()
        if update.block.variant is Variant.BAT
    }
    if not updated:
        return
    names = sorted({name for _, name in updated})
    if bat == "refuse":
        raise UsageError(
            f"BAT cannot be swapped at Bone's price: {listing(names)}",
            hint=f"{MERGE_INSTEAD}; or ask for its activation form, which takes 1.5 to 2 times as "
            "long",
        )
    along_in = sorted({module for (module, _), b in updated.items() if b.axis is not Axis.OUT})
    if along_in:
        raise UsageError(
            f"BAT blocks along the input axis have no activation form here: {listing(along_in)}",
            hint=MERGE_INSTEAD,
        )
    for module in {module for module, _ in updated}:
        ranks = sorted({block.rank for (each, _), block in updated.items() if each == module})
        if len(ranks) > 1:
            raise UsageError(
                f"BAT adapters of several ranks in {module!r}: {ranks}",
                hint="A graph has one rank of BAT for each module; export one graph for each rank",
            )
    note(f"{len({module for module, _ in updated})} modules in {_COST}")


def _slots(graph: Graph, base: Checkpoint, homes: Mapping[str, _Home]) -> dict[str, Slot]:
    """Where each module's weight lies in the graph, and which blocks it takes."""
    stored = {home.weight.name for home in homes.values()}
    found = find_weights(graph, base.tensors, stored)
    lost = sorted(name for name in stored if not found[name])
    if lost:
        raise NameMatchError(
            f"the graph lacks {len(lost)} of the {len(stored)} weights that are adapted: "
            f"{listing(lost)}",
            path=graph.path,
            hint="Is it a graph of this base, without an adapter merged into it?",
        )
    return {
        module: Slot(
            places=tuple(_place(graph, p) for p in found[home.weight.name]),
            bone=any(u.block.variant is not Variant.BAT for u in home.updates.values()),
            bat_rank=next(
                (u.block.rank for u in home.updates.values() if u.block.variant is Variant.BAT),
                None,
            ),
        )
        for module, home in homes.items()
    }


def _place(graph: Graph, placement: Placement) -> Place:
    """A placement as a slice of outputs; raises where it is a slice of inputs."""
    held = placement.initializer
    out, width = placement.shape
    if len(held.shape) != 2:
        raise FormatError(
            f"{held.name!r} is no matrix",
            path=graph.path,
            found=list(held.shape),
            hint=MERGE_INSTEAD,
        )
    across = placement.row if placement.transposed else placement.column
    whole = held.shape[0] if placement.transposed else held.shape[1]
    if across or whole != width:
        raise ShapeError(
            f"{held.name!r} packs weights along their inputs", path=graph.path, hint=MERGE_INSTEAD
        )
    first = placement.column if placement.transposed else placement.row
    return Place(held.name, placement.transposed, first, out, width)
