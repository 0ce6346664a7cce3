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
    from boneconv.planning import MergePlan, plan_merge
    from boneconv.unmerging import UnmergeResult, unmerge
    from boneconv.validation import Validation, validate

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Axis",
    "Block",
    "BoneConfig",
    "BoneconvError",
    "ConvertResult",
    "MergePlan",
    "MergeResult",
    "UnmergeResult",
    "Validation",
    "Variant",
    "__version__",
    "convert",
    "inspect",
    "load_adapter",
    "merge",
    "plan_merge",
    "unmerge",
    "validate",
]

_HOMES = {
    "Adapter": "adapter",
    "Axis": "config",
    "Block": "adapter",
    "BoneConfig": "config",
    "BoneconvError": "errors",
    "ConvertResult": "conversion",
    "MergePlan": "planning",
    "MergeResult": "merging",
    "UnmergeResult": "unmerging",
    "Validation": "validation",
    "Variant": "config",
    "convert": "conversion",
    "inspect": "inspection",
    "load_adapter": "formats",
    "merge": "merging",
    "plan_merge": "planning",
    "unmerge": "unmerging",
    "validate": "validation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
