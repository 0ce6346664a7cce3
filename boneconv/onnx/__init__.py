"""ONNX graphs with adapters: a graph patched, a merged model traced, or one graph for many.

`export` is the workflow: it stages, dispatches (`by_patch`, `by_trace`), records and publishes.
`patching` overwrites the weights of an existing graph, without torch; `tracing` makes a new graph
of a merged checkpoint; `runtime` makes a graph whose adapters are swapped while it runs.
"""

from __future__ import annotations

from boneconv.onnx.export import ExportResult, export_onnx

__all__ = ["ExportResult", "export_onnx"]
