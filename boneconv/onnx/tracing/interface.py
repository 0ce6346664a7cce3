"""The outside of a traced graph: names of axes, the opset, and what the tracer noted down.

Tracers call an axis ``s44`` and leave stack traces, with the paths of the machine, in every node.
Here the axes get names that say what they are, and of the notes only those stay that tell which
module a node came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from boneconv.errors import InputError

__all__ = ["name_axes", "opset_of", "strip_notes"]

_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_TOTAL = {
    "past_sequence_length + sequence_length": "total_sequence_length",
    "sequence_length + past_sequence_length": "total_sequence_length",
}
#: Notes of a node that say where in the model it stands.
_KEPT = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy")


def name_axes(model: Any, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Gives the axes that may change their names, throughout a graph.

    Args:
        model: An ``onnx_ir.Model``; changed in place.
        axes: Input name -> axis -> name.

    Raises:
        InputError: An axis that should change has a fixed size in the graph.
    """
    named: dict[str, str] = {}
    inputs = {value.name: value for value in model.graph.inputs}
    for name, wanted in axes.items():
        for axis, title in wanted.items():
            size = inputs[name].shape[axis]
            if isinstance(size, int):
                raise InputError(
                    f"the traced graph fixes axis {axis} of {name}",
                    expected=f"any {title}",
                    found=str(size),
                )
            named[str(size.value)] = title
    for value in _values(model.graph):
        _rename(value, named)


def _rename(value: Any, named: Mapping[str, str]) -> None:
    if value.shape is None:
        return
    for axis, size in enumerate(value.shape):
        if isinstance(size, int) or size.value is None:
            continue
        text = _SYMBOL.sub(lambda found: named.get(found[0], found[0]), str(size.value))
        value.shape[axis] = _TOTAL.get(text, text)


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def strip_notes(model: Any) -> None:
    """Removes the tracer's notes but for the modules' names; the graph computes the same."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        kept = {key: node.metadata_props[key] for key in _KEPT if key in node.metadata_props}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def opset_of(model: Any) -> int:
    """The version of ONNX's own operators that a graph uses."""
    return int(model.opset_imports[""])
