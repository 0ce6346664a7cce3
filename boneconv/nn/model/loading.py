"""Reading an adapter of a file for a model: what goes where, and whether it fits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from boneconv.adapter import Adapter, Block
from boneconv.config import BoneConfig
from boneconv.errors import ConfigError, NameMatchError, ShapeError, listing
from boneconv.io.safetensors import Tensor
from boneconv.names import module_key
from boneconv.nn.model.attaching import LayerSpec
from boneconv.nn.model.biases import TrainedBiases
from boneconv.nn.model.targets import check_replaceable, listed, refusal
from boneconv.nn.model.tensors import to_torch
from boneconv.nn.model.walking import base_of, bone_layers, saved_modules, walk

__all__ = ["Contents", "read_contents"]


@dataclass
class Contents:
    """What a file has for a model, under the model's own names.

    Attributes:
        config: The configuration of the adapter that it makes.
        specs: What each layer gets.
        blocks: The blocks by layer.
        copies: The modules that are replaced: their tensors by name.
        biases: The biases by name.
        scale: A factor on all blocks.
    """

    config: BoneConfig
    specs: dict[str, LayerSpec] = field(default_factory=dict)
    blocks: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0

    def assign(self, model: torch.nn.Module, adapter: str, biases: TrainedBiases | None) -> None:
        """Puts the values into parameters that were attached for them.

        Blocks take the place of the attached ones, with the file's dtype on the layer's device;
        copies and biases keep the model's dtype.

        Raises:
            NameMatchError: A bias that the model does not have.
            FormatError, MachineError: The file cannot be read.
        """
        for name, layer in bone_layers(model).items():
            if name in self.blocks:
                values = self._scaled(to_torch(self.blocks[name]))
                device = layer.weight.device
                values = values if device.type == "meta" else values.to(device)
                layer.bone_block[adapter] = torch.nn.Parameter(values)
        holders = saved_modules(model)
        for name, tensors in self.copies.items():
            copy = holders[name].modules_to_save[adapter]
            copy.load_state_dict({k: to_torch(t) for k, t in tensors.items()}, strict=False)
        there = {} if biases is None else dict(biases.parameters())
        missing = sorted(set(self.biases) - set(there))
        if missing:
            raise NameMatchError(f"the model has no such biases: {listing(missing)}")
        for name, tensor in self.biases.items():
            there[name].data.copy_(to_torch(tensor))

    def _scaled(self, block: torch.Tensor) -> torch.Tensor:
        """A block with the adapter's strength in it: W + s (W' - W) is linear in the block."""
        if self.scale == 1.0:
            return block
        return block.to(torch.promote_types(block.dtype, torch.float32)) * self.scale


def read_contents(model: torch.nn.Module, adapter: Adapter) -> Contents:
    """Sorts an adapter's tensors to the modules of a model; values are not read yet.

    The blocks say which modules are adapted, not the configuration: each has its own rank.

    Args:
        model: The model, adapted or not.
        adapter: The adapter.

    Raises:
        NameMatchError: A tensor for a module that the model does not have.
        ConfigError: A module that cannot be adapted.
        ShapeError: A tensor that does not fit its module.
    """
    modules = {module_key(name): (name, module) for name, module in walk(model)}
    found = Contents(adapter.config, scale=adapter.scale)
    missing = sorted(set(adapter.blocks) - set(modules))
    if missing:
        linear = [name for name, (_, m) in modules.items() if refusal(m) is None]
        raise NameMatchError(
            f"the model does not have the modules of {len(missing)} of the adapter's "
            f"{len(adapter.blocks)} blocks: {listing(missing)}",
            path=adapter.path,
            expected=f"modules such as {listing(linear[:4])}",
            hint="Is it the model, and the class, that the adapter was trained on?",
        )
    for key, block in adapter.blocks.items():
        name, module = modules[key]
        found.specs[name] = _spec(adapter, name, block, module)
        found.blocks[name] = block.tensor
    for key, tensor in adapter.saved.items():
        _sort_saved(adapter, key, tensor, modules, found)
    check_replaceable(dict(walk(model)), found.copies)
    found.config = _config(adapter, found)
    return found


def _spec(adapter: Adapter, name: str, block: Block, module: torch.nn.Module) -> LayerSpec:
    reason = refusal(module)
    if reason is not None:
        raise ConfigError(f"{name!r} cannot be adapted: {reason}", path=adapter.path)
    config = adapter.config
    dropout = config.miss_dropout if config.peft_type == "MISS" else 0.0
    spec = LayerSpec(block.rank, block.variant, block.axis, block.mini_rank, dropout=dropout)
    expected = spec.shape(name, module)
    if block.tensor.shape != expected:
        raise ShapeError(
            f"the block of {name!r} does not fit its weight",
            path=adapter.path,
            expected=list(expected),
            found=list(block.tensor.shape),
            hint="Is it the model that the adapter was trained on?",
        )
    return spec


def _sort_saved(
    adapter: Adapter,
    key: str,
    tensor: Tensor,
    modules: Mapping[str, tuple[str, torch.nn.Module]],
    found: Contents,
) -> None:
    """Puts a saved tensor among the biases or the copies."""
    owner, _, leaf = key.rpartition(".")
    if owner in adapter.blocks and leaf == "bias":
        found.biases[f"{modules[owner][0]}.bias"] = tensor
        return
    if owner in adapter.blocks:
        _check_same(adapter, key, tensor, modules[owner][1], leaf)
        return
    entries = adapter.config.modules_to_save or ()
    holder = _holder(key, entries, tuple(found.copies))
    is_bias = leaf == "bias" or leaf.endswith("_bias")
    if is_bias and adapter.config.bias == "all" and not listed(entries, holder):
        name = modules[owner][0] if owner in modules else owner
        found.biases[f"{name}.{leaf}" if owner else leaf] = tensor
        return
    rest = key.removeprefix(f"{holder}.")
    state = base_of(modules[holder][1]).state_dict() if holder in modules else {}
    if rest not in state:
        raise NameMatchError(
            f"the model has no place for the saved tensor {key!r}",
            path=adapter.path,
            hint="Is it the model, and the class, that the adapter was trained on?",
        )
    if tuple(state[rest].shape) != tensor.shape:
        raise ShapeError(
            f"the saved tensor {key!r} does not fit the model",
            path=adapter.path,
            expected=list(state[rest].shape),
            found=list(tensor.shape),
            hint="Where the vocabulary has grown, call resize_token_embeddings on the model first",
        )
    found.copies.setdefault(modules[holder][0], {})[rest] = tensor


def _holder(key: str, entries: tuple[str, ...], known: tuple[str, ...]) -> str:
    """The module that is replaced for a tensor: one that the configuration names, or its own."""
    parts = key.split(".")[:-1]
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        if listed(entries, path) or path in known:
            return path
    return ".".join(parts)


def _check_same(
    adapter: Adapter, key: str, tensor: Tensor, module: torch.nn.Module, leaf: str
) -> None:
    """The weight below a block is in a file where PEFT saved an output layer: the base's own."""
    own = getattr(base_of(module), leaf, None)
    same = isinstance(own, torch.Tensor) and tuple(own.shape) == tensor.shape
    if not same or own is None or not torch.equal(to_torch(tensor).to(own), own.detach()):
        raise ConfigError(
            f"the adapter brings {key!r}, which lies below a block and differs from the model's",
            path=adapter.path,
            hint="Put it into the model before, or merge the adapter with boneconv merge",
        )


def _config(adapter: Adapter, found: Contents) -> BoneConfig:
    """The configuration, with what the file has beyond it."""
    config = adapter.config
    if config.bias != "none" and not found.biases:
        warnings.warn(
            f"{adapter.path}: the configuration says bias {config.bias!r}, and the file holds "
            "none (PEFT saves none); the model keeps its own",
            stacklevel=5,
        )
    if config.bias == "none" and found.biases:
        config = replace(config, bias="bone_only")
    entries = config.modules_to_save or ()
    more = tuple(name for name in found.copies if not listed(entries, name))
    return replace(config, modules_to_save=(*entries, *more) or None)
