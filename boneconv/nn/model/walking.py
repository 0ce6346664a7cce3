"""The modules of an adapted model, under the names that they have in the model as it was.

Adapters put modules into the tree: `BoneLinear` around a layer, `SavedModule` around a module that
is trained in full. Names skip them: the layer that `BoneLinear` wraps is still called what it was
called, and nothing below either of the two is a module of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from boneconv.nn.linear import BoneLinear
from boneconv.nn.model.saved_module import SavedModule

__all__ = [
    "base_of",
    "bone_layers",
    "inner_name",
    "replace_modules",
    "saved_modules",
    "tied_to",
    "walk",
]

_ADDED = frozenset({"base_layer", "original_module"})


def walk(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every module below a model with its name, `BoneLinear` and `SavedModule` as leaves.

    A module that stands at several places comes at each of them.
    """
    for name, child in model._modules.items():
        if child is None:
            continue
        yield name, child
        if not isinstance(child, BoneLinear | SavedModule):
            for inner, module in walk(child):
                yield f"{name}.{inner}", module


def base_of(module: torch.nn.Module) -> torch.nn.Module:
    """The module of the model itself: what `BoneLinear` or `SavedModule` is around, if anything."""
    if isinstance(module, BoneLinear):
        return module.base_layer
    return module.original_module if isinstance(module, SavedModule) else module


def bone_layers(model: torch.nn.Module) -> dict[str, BoneLinear]:
    """The adapted layers by name; one that stands at several places has the name of the first."""
    return _of_kind(model, BoneLinear)


def saved_modules(model: torch.nn.Module) -> dict[str, SavedModule]:
    """The modules that some adapter trains in full, by name."""
    return _of_kind(model, SavedModule)


def replace_modules(
    model: torch.nn.Module, pairs: Iterable[tuple[torch.nn.Module, torch.nn.Module]]
) -> None:
    """Puts modules into every place of the tree where others stand.

    Args:
        model: The model.
        pairs: What stands in it, and what takes its place; asked for one at a time.
    """
    places: dict[int, list[str]] = {}
    for name, module in walk(model):
        places.setdefault(id(module), []).append(name)
    for old, new in pairs:
        for name in places[id(old)]:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)


def inner_name(path: str) -> str:
    """The name in the model as it was of a parameter or module below an adapted model."""
    return ".".join(part for part in path.split(".") if part not in _ADDED)


def tied_to(model: torch.nn.Module, module: torch.nn.Module) -> tuple[str, ...]:
    """The names of the parameters of other modules that are the weight of a module, too."""
    base = base_of(module)
    weight = getattr(base, "weight", None)
    return tuple(
        inner_name(path)
        for path, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight and model.get_submodule(path.rpartition(".")[0]) is not base
    )


def _of_kind(model: torch.nn.Module, kind: type[Any]) -> dict[str, Any]:
    found: dict[int, tuple[str, torch.nn.Module]] = {}
    for name, module in walk(model):
        if isinstance(module, kind):
            found.setdefault(id(module), (name, module))
    return dict(found.values())
