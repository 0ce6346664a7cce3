"""boneconv: the format, the reference implementation and the deployment tools for Bone and BAT.

The public names below are imported on first use: ``import boneconv`` itself loads neither numpy nor
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from boneconv.adapter import Adapter, Block
    from boneconv.config import Axis, BoneConfig, Variant
    from boneconv.conversion import ConvertResult, convert
    from boneconv.errors import BoneconvError
    from boneconv.formats import load_adapter
    from boneconv.inspection import inspect
    from boneconv.merging import MergeResult, merge
    from boneconv.nn.linear import BoneLinear
    from boneconv.nn.model.bone_model import BoneModel
    from boneconv.onnx import ExportResult, export_onnx
    from boneconv.onnx.runtime.session import AdapterSession
    from boneconv.planning import MergePlan, plan_merge
    from boneconv.unmerging import UnmergeResult, unmerge
    from boneconv.validation import Validation, validate
    from boneconv.verification import DiffReport, Report, diff, verify

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterSession",
    "Axis",
    "Block",
    "BoneConfig",
    "BoneLinear",
    "BoneModel",
    "BoneconvError",
    "ConvertResult",
    "DiffReport",
    "ExportResult",
    "MergePlan",
    "MergeResult",
    "Report",
    "UnmergeResult",
    "Validation",
    "Variant",
    "__version__",
    "convert",
    "diff",
    "export_onnx",
    "inspect",
    "load_adapter",
    "merge",
    "plan_merge",
    "unmerge",
    "validate",
    "verify",
]

_HOMES = {
    "Adapter": "adapter",
    "AdapterSession": "onnx.runtime.session",
    "Axis": "config",
    "Block": "adapter",
    "BoneConfig": "config",
    "BoneLinear": "nn.linear",
    "BoneModel": "nn.model.bone_model",
    "BoneconvError": "errors",
    "ConvertResult": "conversion",
    "DiffReport": "verification",
    "ExportResult": "onnx",
    "MergePlan": "planning",
    "MergeResult": "merging",
    "Report": "verification",
    "UnmergeResult": "unmerging",
    "Validation": "validation",
    "Variant": "config",
    "convert": "conversion",
    "diff": "verification",
    "export_onnx": "onnx",
    "inspect": "inspection",
    "load_adapter": "formats",
    "merge": "merging",
    "plan_merge": "planning",
    "unmerge": "unmerging",
    "validate": "validation",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
