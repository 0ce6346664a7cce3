"""Tracing: a merged checkpoint becomes an ONNX graph, which is checked before anyone sees it.

Causal language models are traced with a past, into one graph for a prompt and for the tokens after
it; all others by torch's exporter with a batch and a length that may change. The graph is written,
read back and held against ONNX's rules, ONNX Runtime and every weight of the checkpoint.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from boneconv.dtypes import by_cli_name
from boneconv.errors import InputError, UsageError
from boneconv.io.checkpoint import Checkpoint, open_checkpoint
from boneconv.io.copying import copy_file
from boneconv.io.files import machine_errors
from boneconv.onnx.child import accept_in_child
from boneconv.onnx.tracing.exporter import Traced, trace_plain, trace_with_past
from boneconv.onnx.tracing.found import GraphWeights, check_all_found, digests
from boneconv.onnx.tracing.interface import name_axes, opset_of, strip_notes
from boneconv.onnx.tracing.samples import make_sample, with_past
from boneconv.onnx.tracing.source import (
    Needed,
    load_model,
    needed_weights,
    reached_parameters,
    require_tracing,
)
from boneconv.onnx.tracing.tasks import AUTO, Task, choose_task
from boneconv.onnx.tracing.weight_bytes import weight_bytes
from boneconv.strict_json import read_object

__all__ = [
    "DEFAULT_OPSET",
    "DTYPES",
    "MIN_OPSET",
    "TraceSummary",
    "copy_side_files",
    "predict_memory",
    "trace_graph",
]

GRAPH, DATA = "model.onnx", "model.onnx.data"

#: The dtypes of a traced graph, by the command line's names.
DTYPES = ("float32", "float16", "bfloat16")
#: torch's exporter translates into this version of ONNX's operators or a newer one.
MIN_OPSET = 18
DEFAULT_OPSET = 20

#: Weights of more bytes than this lie in a file beside the graph. A graph may not exceed 2 GiB, and
#: a small one is easier to rewrite and to read.
_INLINE = 100 * 2**20

#: Peak memory of tracing: libraries and graph, and how often the weights are in memory.
_FIXED, _TIMES = 700 * 10**6, 1.1

#: Files of a checkpoint that say nothing about the graph, or something else.
_LEFT_OUT = ("boneconv.json", "README.md")
_LEFT_OUT_SUFFIXES = (".py", ".ipynb")


@dataclass(frozen=True)
class TraceSummary:
    """What tracing did.

    Attributes:
        graph: The graph's file.
        data: The file of its weights, where they lie beside it.
        task: The task, as optimum names it.
        dtype: Dtype of the graph's weights.
        opset: Version of ONNX's operators.
        exporter: What traced it, with its version.
        weights: How many weights of the checkpoint were found again in the graph: all it needs.
        dropped: Tensors of the checkpoint that the task has no use for.
        predicted_memory: Bytes that were predicted beforehand.
        side_files: Files copied beside the graph.
        notes: What the user should know.
    """

    graph: Path
    data: Path | None
    task: str
    dtype: str
    opset: int
    exporter: str
    weights: int
    dropped: tuple[str, ...]
    predicted_memory: int
    side_files: tuple[Path, ...]
    notes: tuple[str, ...]


def trace_graph(
    merged: Path,
    target: Path,
    *,
    task: str = AUTO,
    dtype: str | None = None,
    opset: int | None = None,
    note: Callable[[str], None] | None = None,
) -> TraceSummary:
    """Traces a merged checkpoint into an ONNX graph, with tokenizer and configuration beside it.

    No code that comes with the checkpoint is run.

    Args:
        merged: A folder of safetensors weights with a config.json.
        target: An empty folder; gets ``model.onnx`` and, where the weights exceed 100 MiB,
            ``model.onnx.data``.
        task: A name of `boneconv.onnx.tracing.tasks.TASKS`; ``auto`` goes by the architecture.
        dtype: ``float32`` (the default), ``float16`` or ``bfloat16``.
        opset: Version of ONNX's operators, 18 or above; 20 by default.
        note: Is told the memory that tracing needs, before it begins, and every remark.

    Raises:
        MissingExtraError: transformers or onnxscript is not installed.
        UsageError: An option that cannot be, or a model for which no graph is traced.
        InputError: The model cannot be loaded or traced; NameMatchError where the checkpoint lacks
            weights of the task, NonFiniteError where one does not fit the dtype.
        CheckFailedError: The graph breaks ONNX's rules, does not load in ONNX Runtime, or does not
            hold every weight; the first is named.
    """
    require_tracing()
    dtype, opset = _checked_dtype(dtype), _checked_opset(opset)
    checkpoint = _open(merged)
    chosen = choose_task(read_object(merged / "config.json"), task)
    notes: list[str] = []

    def remark(text: str) -> None:
        notes.append(text)
        if note is not None:
            note(text)

    predicted = predict_memory(checkpoint, dtype)
    if note is not None:
        note(f"tracing needs about {predicted / 1e9:.1f} GB of memory")
    needed, converted, model, traced = _trace(checkpoint, chosen, dtype, opset, remark)
    written = opset_of(traced.graph)
    if written != opset:
        remark(f"the graph is of opset {written}: torch could not convert it to {opset}")
    data = _save(traced.graph, target)
    _release(model, traced.graph)
    runs_here = dtype != "bfloat16"
    if not runs_here:
        remark("ONNX Runtime lacks most bfloat16 kernels on the CPU: run this graph on a GPU")
    accept_in_child(target / GRAPH, load=runs_here)
    count = _find_weights(target / GRAPH, checkpoint, needed, converted, dtype)
    return TraceSummary(
        graph=target / GRAPH,
        data=data,
        task=chosen.name,
        dtype=dtype,
        opset=written,
        exporter=traced.exporter,
        weights=count,
        dropped=needed.dropped,
        predicted_memory=predicted,
        side_files=copy_side_files(checkpoint, target),
        notes=tuple(notes),
    )


def predict_memory(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of resident memory that tracing takes at its peak: 0.7 GB and 1.1 times the weights.

    Measured with torch 2.13 and transformers 5.23 in float32: 0.53 GB for tiny models, 0.87 GB for
    0.34 GB of weights and 1.61 GB for 1.08 GB in four layers, 1.24 GB for 0.54 GB in thirty.
    """
    return int(_FIXED + _TIMES * weight_bytes(checkpoint, dtype))


def copy_side_files(checkpoint: Checkpoint, target: Path) -> tuple[Path, ...]:
    """Copies tokenizer, configuration and the like beside a graph.

    Returns:
        The copies.
    """
    copies = []
    for name in checkpoint.side_files:
        if str(name) in _LEFT_OUT or name.suffix in _LEFT_OUT_SUFFIXES:
            continue
        copy = target / name
        copy_file(checkpoint.root / name, copy)
        copies.append(copy)
    return tuple(copies)


def _checked_dtype(dtype: str | None) -> str:
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(
            "no dtype of a traced graph", expected=", ".join(DTYPES), found=repr(dtype)
        )
    return dtype or "float32"


def _checked_opset(opset: int | None) -> int:
    newest = int(import_module("onnx").defs.onnx_opset_version())
    if opset is not None and not MIN_OPSET <= opset <= newest:
        raise UsageError(
            "an opset that cannot be traced",
            expected=f"{MIN_OPSET} to {newest}",
            found=str(opset),
        )
    return opset or DEFAULT_OPSET


def _open(merged: Path) -> Checkpoint:
    checkpoint = open_checkpoint(merged)
    if checkpoint.config is None or checkpoint.single_file:
        raise InputError(
            "only a folder with a config.json can be traced",
            path=merged,
            hint="Patch a graph that exists with --graph",
        )
    return checkpoint


def _trace(
    checkpoint: Checkpoint, task: Task, dtype: str, opset: int, remark: Callable[[str], None]
) -> tuple[Needed, dict[str, tuple[bytes, ...]], Any, Traced]:
    """What the graph must hold, parameters put together on loading, the model, and the graph."""
    model = load_model(checkpoint, task, dtype)
    sample = make_sample(model, task, checkpoint.root)
    outputs = model(**sample.inputs, return_dict=True)
    _check_outputs(model, task, outputs)
    needed = needed_weights(checkpoint, model, reached_parameters(model, outputs, task.outputs))
    del outputs
    parameters = model.state_dict()
    converted = {name: digests(_array(parameters[name])) for name in needed.converted}
    if task.past:
        sample = with_past(model, sample)
        traced = trace_with_past(model, sample, opset=opset, note=remark)
    else:
        traced = trace_plain(model, sample, task.outputs, opset=opset)
    strip_notes(traced.graph)
    name_axes(traced.graph, {**sample.axes, **sample.past_axes})
    return needed, converted, model, traced


def _check_outputs(model: Any, task: Task, outputs: Any) -> None:
    lacking = [name for name in task.outputs if outputs.get(name) is None]
    if lacking:
        raise UsageError(
            f"{type(model).__name__} does not give what {task.name} is about",
            expected=", ".join(task.outputs),
            found=", ".join(outputs.keys()),
            hint="Choose another --task",
        )


def _array(tensor: Any) -> Any:
    torch, dtypes = import_module("torch"), import_module("ml_dtypes")
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.uint16).numpy().view(dtypes.bfloat16)
    return tensor.detach().numpy()


def _save(graph: Any, target: Path) -> Path | None:
    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    data = DATA if weights > _INLINE else None
    with machine_errors(target):
        import_module("onnx_ir").save(graph, str(target / GRAPH), external_data=data)
    return None if data is None else target / data


def _release(model: Any, graph: Any) -> None:
    """Gives the weights' memory back, which the tracer's own caches would hold on to."""
    torch = import_module("torch")
    for value in graph.graph.initializers.values():
        value.const_value = None
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)
    gc.collect()


def _find_weights(
    path: Path,
    checkpoint: Checkpoint,
    needed: Needed,
    converted: dict[str, tuple[bytes, ...]],
    dtype: str,
) -> int:
    graph = GraphWeights(path)
    weights = [(name, checkpoint.tensors[name].read) for name in needed.tensors]
    return check_all_found(graph, weights, converted, by_cli_name(dtype))
