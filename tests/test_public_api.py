"""The public names: pinned, resolvable, and the same objects as in their homes."""

from __future__ import annotations

import importlib
import pkgutil
import re
from types import ModuleType

import pytest

import boneconv

PUBLIC = [
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

MODULES = sorted(info.name for info in pkgutil.walk_packages(boneconv.__path__, "boneconv."))


def test_the_public_names_are_pinned() -> None:
    assert boneconv.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves_and_is_listed(name: str) -> None:
    value = getattr(boneconv, name)
    assert name in dir(boneconv)
    assert name == "__version__" or value.__name__ == name
    assert name == "__version__" or value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'boneconv' has no attribute 'nothing'"):
        boneconv.nothing  # noqa: B018


def test_the_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", boneconv.__version__)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_and_exports_what_it_has(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    assert module.__doc__
    exported = getattr(module, "__all__", [])
    assert len(exported) == len(set(exported))
    assert all(hasattr(module, each) for each in exported)
