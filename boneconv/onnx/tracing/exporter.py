"""From a model to an ONNX graph: the boundary to transformers' ``OnnxExporter`` and torch's.

`OnnxExporter` is young and patches much of what it exports, so the versions it was tried with are
listed here and any other is passed over: torch's own exporter then does the work, and a message
says so. Both give the same inputs and outputs. Read against transformers 5.23 and torch 2.13.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from boneconv.errors import InputError, first_line
from boneconv.names.architecture import transformers_version
from boneconv.onnx.tracing.quiet import quiet_export
from boneconv.onnx.tracing.samples import Sample

__all__ = ["Traced", "trace_plain", "trace_with_past"]

#: The releases of transformers whose ``OnnxExporter`` was tried.
TRIED = ("5.23",)

_OPTIONS = {"dynamic", "dynamic_shapes", "opset_version", "optimize"}
_CACHE_VALUE = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(keys|values)")
_CACHE_PARTS = {"keys": "key", "values": "value"}
_CACHE_SIDES = {"input": "past_key_values", "output": "present"}
#: What tracing a model that cannot be traced has raised.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Traced:
    """A traced graph.

    Attributes:
        graph: The model in memory, an ``onnx_ir.Model``.
        exporter: What traced it, with its version.
    """

    graph: Any
    exporter: str


class _NotUsableError(Exception):
    """Why `OnnxExporter` is passed over."""


def trace_plain(
    model: Any, sample: Sample, outputs: Sequence[str], *, opset: int, optimize: bool = True
) -> Traced:
    """Traces a model by ``torch.onnx.export``.

    Args:
        model: The model.
        sample: Its inputs; those of the past are appended where there are any.
        outputs: The outputs of the model that the graph gives. After them comes what is kept for
            later tokens, where the sample has a past.
        opset: The version of ONNX's operators.
        optimize: Whether constants are folded, which also transposes weights.

    Raises:
        InputError: torch cannot trace this model.
    """
    torch = import_module("torch")
    inputs = {**sample.inputs, **_flat_past(sample)}
    dynamic = torch.export.Dim.DYNAMIC
    axes = {**sample.axes, **sample.past_axes}
    shapes = {_argument(name): dict.fromkeys(axes[name], dynamic) for name in inputs}
    present = [f"present.{name.removeprefix('past_key_values.')}" for name in _flat_past(sample)]
    try:
        with quiet_export(), _flattened(model, sample, outputs), torch.no_grad():
            program = torch.onnx.export(
                model,
                args=(),
                kwargs={_argument(name): tensor for name, tensor in inputs.items()},
                dynamic_shapes=shapes,
                input_names=list(inputs),
                output_names=[*outputs, *present],
                opset_version=opset,
                dynamo=True,
                optimize=optimize,
                verbose=False,
            )
    except _FAILURES as error:
        raise InputError(
            f"torch cannot trace {type(model).__name__}: ({first_line(error)})",
            hint="Patch a graph that exists with --graph, which needs no tracing",
        ) from error
    return Traced(program.model, f"torch.onnx {torch.__version__}")


def trace_with_past(
    model: Any, sample: Sample, *, opset: int, note: Callable[[str], None]
) -> Traced:
    """Traces a causal language model: one graph for a prompt and for the tokens after it.

    Args:
        model: The model.
        sample: Its inputs with a past, see `boneconv.onnx.tracing.samples.with_past`.
        opset: The version of ONNX's operators.
        note: Is told where transformers' exporter is passed over.

    Returns:
        A graph with the inputs of the sample and ``past_key_values.N.key`` and ``.value``, which
        gives ``logits`` and ``present.N.key`` and ``.value``.

    Raises:
        InputError: Neither exporter can trace the model.
    """
    try:
        return _by_transformers(model, sample, opset)
    except _NotUsableError as reason:
        note(f"{reason}; tracing with torch's own exporter")
    return trace_plain(model, sample, ("logits",), opset=opset)


def _by_transformers(model: Any, sample: Sample, opset: int) -> Traced:
    version = transformers_version()
    exporter, options = _onnx_exporter(version)
    torch = import_module("torch")
    dynamic = torch.export.Dim.DYNAMIC
    shapes: dict[str, Any] = {
        name: dict.fromkeys(axes, dynamic) for name, axes in sample.axes.items()
    }
    shapes["past_key_values"] = [dict.fromkeys(axes, dynamic) for axes in sample.past_axes.values()]
    inputs = {**sample.inputs, "past_key_values": _cache(sample.past, model), "use_cache": True}
    wanted = options(dynamic=True, dynamic_shapes=shapes, opset_version=opset, optimize=True)
    try:
        with quiet_export():
            graph = exporter().export(model, inputs, wanted).program
        _rename_cache(graph.graph)
    except _FAILURES as error:
        raise _NotUsableError(
            f"transformers {version} cannot export ({first_line(error)})"
        ) from error
    return Traced(graph, f"transformers {version} OnnxExporter")


def _onnx_exporter(version: str) -> tuple[Any, Any]:
    """The exporter of transformers and its options, where they are those that were tried."""
    if not version.startswith(tuple(f"{series}." for series in TRIED)):
        raise _NotUsableError(
            f"the OnnxExporter of transformers {version} is untried here "
            f"(tried: {', '.join(TRIED)})"
        )
    try:
        module = import_module("transformers.exporters.exporter_onnx")
        exporter, options = module.OnnxExporter, module.OnnxConfig
        lacking = _OPTIONS - {field.name for field in fields(options)}
    except (ImportError, AttributeError, TypeError) as error:
        raise _NotUsableError(f"transformers {version} has no OnnxExporter") from error
    if lacking:
        raise _NotUsableError(f"the OnnxExporter of transformers {version} lacks {sorted(lacking)}")
    return exporter, options


def _rename_cache(graph: Any) -> None:
    """Names the past as the ecosystem does: ``past_key_values.N.key``, ``present.N.key``."""
    for value in (*graph.inputs, *graph.outputs):
        found = _CACHE_VALUE.fullmatch(value.name)
        if found is not None:
            side, layer, part = found.groups()
            value.name = f"{_CACHE_SIDES[side]}.{layer}.{_CACHE_PARTS[part]}"
        elif "past_key_values" in value.name:
            raise ValueError(f"a cache whose parts are named {value.name}")


def _flat_past(sample: Sample) -> dict[str, Any]:
    tensors = (tensor for pair in sample.past for tensor in pair)
    return dict(zip(sample.past_axes, tensors, strict=True))


def _argument(name: str) -> str:
    """A graph input's name as the name of an argument."""
    return name.replace(".", "_")


def _cache(past: Sequence[tuple[Any, Any]], model: Any) -> Any:
    cache = import_module("transformers").DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    return cache


@contextlib.contextmanager
def _flattened(model: Any, sample: Sample, outputs: Sequence[str]) -> Iterator[None]:
    """Gives the model a forward pass from tensors to a tuple of the wanted outputs."""
    original = model.forward
    past = [_argument(name) for name in sample.past_axes]
    caching = "use_cache" in inspect.signature(original).parameters
    kind = import_module("transformers").DynamicCache

    def forward(**tensors: Any) -> tuple[Any, ...]:
        kept = [tensors.pop(name) for name in past]
        if caching:
            tensors["use_cache"] = bool(past)
        if past:
            tensors["past_key_values"] = kind(list(zip(kept[::2], kept[1::2], strict=True)))
        found: Mapping[str, Any] = original(**tensors, return_dict=True)
        wanted = [found[name] for name in outputs]
        for layer in found["past_key_values"].layers if past else ():
            wanted += [layer.keys, layer.values]
        return tuple(wanted)

    names = [*(_argument(name) for name in sample.inputs), *past]
    signature = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    forward.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        model.forward = original
