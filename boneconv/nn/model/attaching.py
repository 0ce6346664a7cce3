"""Putting an adapter's parameters into a model, and taking them out again.

`LayerSpec` says what one layer gets; a configuration gives equal ones for all layers, a file may
give each layer its own rank. All of them are held against their layers before any is built.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from boneconv.config import Axis, BoneConfig, Variant
from boneconv.errors import BoneconvError, listing
from boneconv.nn.linear import BoneLinear
from boneconv.nn.model.saved_module import SavedModule
from boneconv.nn.model.walking import (
    base_of,
    bone_layers,
    replace_modules,
    saved_modules,
    tied_to,
    walk,
)
from boneconv.nn.updates import block_shape

__all__ = ["LayerSpec", "attach_blocks", "attach_copies", "detach", "spec_of", "warn_of_ties"]


@dataclass(frozen=True)
class LayerSpec:
    """What an adapter puts into one layer.

    Attributes:
        rank: r.
        variant: How the block updates the weight.
        axis: The axis of BAT's blocks.
        mini_rank: The width of a mini block.
        init_weights: Whether the block begins at zero rather than random.
        dropout: Probability with which inputs are dropped while training.
    """

    rank: int
    variant: Variant
    axis: Axis = Axis.OUT
    mini_rank: int = 1
    init_weights: bool = True
    dropout: float = 0.0

    def shape(self, name: str, module: torch.nn.Module) -> tuple[int, ...]:
        """The block's shape for a layer.

        Raises:
            ShapeError: The rank does not fit the layer's weight.
        """
        weight = base_of(module).weight
        assert isinstance(weight, torch.Tensor)
        rows, columns = weight.shape[0], weight.shape[1]
        try:
            return block_shape(self.variant, self.axis, self.rank, self.mini_rank, (rows, columns))
        except BoneconvError as error:
            raise error.restated(f"{name!r}: {error.message}", None) from error


def spec_of(config: BoneConfig) -> LayerSpec:
    """What a configuration puts into every layer."""
    return LayerSpec(
        config.r,
        config.variant,
        config.axis,
        config.mini_r,
        init_weights=config.init_weights is not False,
        dropout=config.miss_dropout if config.peft_type == "MISS" else 0.0,
    )


def attach_blocks(
    model: torch.nn.Module,
    adapter: str,
    specs: Mapping[str, LayerSpec],
    *,
    meta: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Gives layers a block each.

    Args:
        model: The model.
        adapter: The adapter's name.
        specs: What each layer gets, by its name.
        meta: Whether the blocks are made on the meta device.
        dtype: The blocks' dtype; each its weight's by default.

    Raises:
        ShapeError: A rank does not fit a layer; nothing was attached.
    """
    modules = dict(walk(model))
    for name, spec in specs.items():
        spec.shape(name, modules[name])
    layers: dict[int, BoneLinear] = {}
    new: list[tuple[torch.nn.Module, BoneLinear]] = []
    for name, spec in specs.items():
        module = modules[name]
        if id(module) in layers:  # one module at two places
            continue
        if isinstance(module, BoneLinear):
            layer = module
        else:
            layer = BoneLinear(module)
            layer.training = module.training
            new.append((module, layer))
        layers[id(module)] = layer
        layer.add_adapter(
            adapter,
            r=spec.rank,
            variant=spec.variant,
            axis=spec.axis,
            mini_r=spec.mini_rank,
            init_weights=spec.init_weights,
            dropout=spec.dropout,
            device=torch.device("meta") if meta else None,
            dtype=dtype,
        )
    replace_modules(model, new)


def attach_copies(
    model: torch.nn.Module,
    adapter: str,
    modules: Mapping[str, torch.nn.Module],
    *,
    meta: bool = False,
) -> None:
    """Gives modules a copy that the adapter trains in full.

    Raises:
        ConfigError: A module has no forward that a copy could replace.
    """
    holders: dict[int, SavedModule] = {}
    new: list[tuple[torch.nn.Module, SavedModule]] = []
    for module in modules.values():
        if id(module) in holders:
            continue
        if isinstance(module, SavedModule):
            holder = module
        else:
            holder = SavedModule(module)
            new.append((module, holder))
        holders[id(module)] = holder
        holder.add_adapter(adapter, meta=meta)
    replace_modules(model, new)


def detach(model: torch.nn.Module, adapter: str) -> None:
    """Takes an adapter's blocks and copies out; what then holds no adapter gives way to its base.

    Merged layers are the caller's to unmerge.
    """
    bare: list[tuple[torch.nn.Module, torch.nn.Module]] = []
    for layer in bone_layers(model).values():
        if adapter in layer.bone_block:
            layer.delete_adapter(adapter)
        if not len(layer.bone_block):
            bare.append((layer, layer.base_layer))
    for holder in saved_modules(model).values():
        holder.delete_adapter(adapter)
        if not len(holder.modules_to_save):
            bare.append((holder, holder.original_module))
    replace_modules(model, bare)


def warn_of_ties(model: torch.nn.Module, modules: Mapping[str, torch.nn.Module]) -> None:
    """Warns where a module that an adapter changes shares its weight with another module."""
    for name, module in modules.items():
        others = tied_to(model, module)
        if not others:
            continue
        warnings.warn(
            f"the weight of {name!r} is tied to {listing(list(others))}: the adapter changes "
            f"{name!r} alone. A merge makes the two differ, and the merged model's configuration "
            "says so (tie_word_embeddings false)",
            stacklevel=4,
        )
