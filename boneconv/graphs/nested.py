"""The graphs inside a graph: the bodies of If, Loop and the like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto

__all__ = ["nested_graphs"]


def nested_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and all graphs inside its nodes, each before what is in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from nested_graphs(inner)
