"""Graphs whose weights are quantised: recognised by their operators, and refused."""

from __future__ import annotations

from boneconv.errors import FormatError, listing
from boneconv.graphs.model import Graph

__all__ = ["quantised_ops", "refuse_quantised"]

_OPS = {
    "ConvInteger",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QuantizeLinear",
    "com.microsoft.DynamicQuantizeLSTM",
    "com.microsoft.DynamicQuantizeMatMul",
    "com.microsoft.GatherBlockQuantized",
    "com.microsoft.MatMulBnb4",
    "com.microsoft.MatMulFpQ4",
    "com.microsoft.MatMulInteger16",
    "com.microsoft.MatMulIntegerToFloat",
    "com.microsoft.MatMulNBits",
    "com.microsoft.QAttention",
    "com.microsoft.QMoE",
}
_PREFIXES = ("QLinear", "com.microsoft.QLinear", "com.microsoft.QOrdered", "com.microsoft.QGemm")


def quantised_ops(graph: Graph) -> list[str]:
    """The operators of a graph that work on quantised weights, sorted."""
    return sorted(op for op in graph.ops if op in _OPS or op.startswith(_PREFIXES))


def refuse_quantised(graph: Graph) -> None:
    """Raises FormatError where a graph has operators that work on quantised weights."""
    found = quantised_ops(graph)
    if found:
        raise FormatError(
            "the graph is quantised: an adapter merges into floating weights",
            path=graph.path,
            found=listing([op.rpartition(".")[2] for op in found]),
            hint="Export with the graph that it was quantised from, then quantise the result",
        )
