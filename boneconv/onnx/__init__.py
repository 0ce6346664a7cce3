"""ONNX graphs with adapters: a graph patched, a merged model traced, or one graph for many.

`export` is the workflow: it stages, dispatches, records and publishes. `patch` and the modules of
its name overwrite the weights of an existing graph, without torch; `trace` makes a new graph of a
merged checkpoint, `genai` a folder for onnxruntime-genai; the modules named ``runtime`` make a
graph whose adapters are swapped while it runs.
"""

from __future__ import annotations

from boneconv.onnx.export import ExportResult, export_onnx

__all__ = ["ExportResult", "export_onnx"]
