"""ONNX graphs as holders of weights: read without loading them, searched by content.

`open_graph` reads a graph's structure and says where every float tensor's bytes lie, external or
inline, in bounded memory. `find_weights` says where a checkpoint's tensors are among them, whatever
the exporter made of their names: as they are, transposed, or slices of packed ones. `quantised_ops`
names the operators that work on quantised weights.

    graph = open_graph(Path("model.onnx"))
    graph.proto              # onnx.ModelProto without weights: read it, do not save it
    graph.initializers       # name -> Initializer(name, dtype, shape, path, offset), .read()
    graph.uses               # name -> the nodes that read it: Use(op, node, index, module)
    places = find_weights(graph, checkpoint.tensors, ["model.layers.0.mlp.up_proj.weight"])
    places["model.layers.0.mlp.up_proj.weight"][0].read()     # [out, in], as the graph holds it
"""

from __future__ import annotations

from boneconv.graphs.initializers import Initializer
from boneconv.graphs.lookup import find_weights, matrix_shape, missing_weights
from boneconv.graphs.model import GRAPH_NAME, Graph, Use, open_graph
from boneconv.graphs.nested import nested_graphs
from boneconv.graphs.placement import Placement
from boneconv.graphs.quantised import quantised_ops, refuse_quantised

__all__ = [
    "GRAPH_NAME",
    "Graph",
    "Initializer",
    "Placement",
    "Use",
    "find_weights",
    "matrix_shape",
    "missing_weights",
    "nested_graphs",
    "open_graph",
    "quantised_ops",
    "refuse_quantised",
]
