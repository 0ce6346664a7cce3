"""Writing the adapters of a model: PEFT's layout, or the Bone Adapter Format.

The tensors are first written to a draft, from which the parts that write adapters of files
(`boneconv.formats`) make the final files, read them back and compare. Those then replace what the
folder had: a folder never holds the weights of one adapter with the configuration of another.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from boneconv.adapter import Adapter, Block
from boneconv.config import CONFIG_NAME, BoneConfig, Variant
from boneconv.errors import ConfigError, UsageError
from boneconv.formats import peft_write
from boneconv.formats.native import Metadata, Module, NativeAdapter, write_native
from boneconv.formats.native.peft_config import FREE_FIELDS
from boneconv.formats.native.tensors import BLOCK, PREFIX
from boneconv.formats.peft import SAFETENSORS_NAME
from boneconv.io.files import machine_errors, sync_folder
from boneconv.io.safetensors import StoredTensor, read_header
from boneconv.names import module_key
from boneconv.nn.model.attaching import LayerSpec
from boneconv.nn.model.biases import TrainedBiases
from boneconv.nn.model.tensors import SAFETENSORS_DTYPES, write_torch
from boneconv.nn.model.walking import bone_layers, inner_name, saved_modules
from boneconv.nn.updates import Update

__all__ = ["FORMATS", "Collected", "collect", "save_adapters", "with_origin"]

#: What `save_adapters` can be told to write.
FORMATS = ("auto", "peft", "native")

_DEFAULT = "default"


@dataclass
class Collected:
    """An adapter's parameters, by the names of their modules in the model as it was.

    Attributes:
        config: Its configuration.
        blocks: The blocks by module.
        layers: What each block is.
        shapes: The shapes of the weights that they update.
        copies: The modules that it trains in full: their tensors by name.
        biases: The biases that it trains, by name.
    """

    config: BoneConfig
    blocks: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: dict[str, LayerSpec] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    copies: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)

    def saved(self) -> dict[str, torch.Tensor]:
        """Everything but the blocks, by name."""
        copies = {f"{m}.{leaf}": t for m, own in self.copies.items() for leaf, t in own.items()}
        return copies | self.biases


def collect(
    model: torch.nn.Module,
    name: str,
    config: BoneConfig,
    biases: TrainedBiases | None,
    state_dict: Mapping[str, torch.Tensor] | None,
) -> Collected:
    """An adapter's parameters; sharded ones are gathered, which all processes have to do.

    Args:
        model: The adapted model.
        name: The adapter.
        config: Its configuration.
        biases: The biases that it trains.
        state_dict: Where to take values from: a state dict of the `BoneModel`.

    Raises:
        ConfigError: A parameter has no values, or the state dict lacks it.
    """

    def values(path: str, tensor: torch.Tensor) -> torch.Tensor:
        if state_dict is None:
            return _whole(path, tensor)
        if f"model.{path}" not in state_dict:
            raise ConfigError(
                "the state dict lacks a parameter of the adapter",
                expected=f"model.{path}",
                hint="Give that of the whole BoneModel",
            )
        return _whole(path, state_dict[f"model.{path}"])

    found = Collected(config)
    for path, layer in bone_layers(model).items():
        if name in layer.bone_block:
            module = module_key(path)
            block = layer.bone_block[name]
            found.blocks[module] = values(f"{path}.bone_block.{name}", block)
            found.layers[module] = _spec(layer.updates([name])[0])
            found.shapes[module] = tuple(layer.weight.shape)
    for path, holder in saved_modules(model).items():
        if name in holder.modules_to_save:
            own = holder.modules_to_save[name].state_dict()
            found.copies[module_key(path)] = {
                leaf: values(f"{path}.modules_to_save.{name}.{leaf}", tensor)
                for leaf, tensor in own.items()
            }
    if biases is not None:
        paths = {inner_name(path): path for path, _ in model.named_parameters()}
        for bias, tensor in biases.trained().items():
            inside = biases.inside and state_dict is not None
            whole = values(paths[bias], tensor) if inside else _whole(bias, tensor)
            found.biases[module_key(bias)] = whole
    return found


def with_origin(
    config: BoneConfig, model: torch.nn.Module, kind: type[torch.nn.Module]
) -> BoneConfig:
    """A configuration that names the base, and its class where there is no task, as PEFT has it."""
    name = getattr(model, "name_or_path", None)
    if config.base_model_name_or_path is None and isinstance(name, str) and name:
        config = replace(config, base_model_name_or_path=name)
    if config.task_type is None and config.auto_mapping is None:
        names = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        config = replace(config, auto_mapping=names)
    return config


def save_adapters(
    adapters: Mapping[str, Collected],
    folder: str,
    *,
    format: str,  # noqa: A002
    write: bool,
) -> None:
    """Saves adapters: ``default`` into the folder itself, the others into folders in it.

    Args:
        adapters: The adapters by name.
        folder: The folder.
        format: One of `FORMATS`.
        write: Whether to write; otherwise what is wrong with it all is only found.

    Raises:
        UsageError: An unknown format, or ``peft`` for an adapter that it cannot hold.
        DiskFullError, MachineError: The folder cannot be written.
    """
    if format not in FORMATS:
        raise UsageError("no format to save as", expected=", ".join(FORMATS), found=repr(format))
    for name, adapter in adapters.items():
        if write:
            place = Path(folder) if name == _DEFAULT else Path(folder) / name
            _save(name, adapter, place, format)


def _save(name: str, collected: Collected, folder: Path, kind: str) -> None:
    with machine_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".adapter-", dir=folder))
    try:
        source = work / "source.safetensors"
        tensors = {f"{module}.{BLOCK}": t for module, t in collected.blocks.items()}
        write_torch(source, tensors | collected.saved())
        stored = read_header(source).tensors
        made = _make(name, collected, stored, work, kind)
        _publish(made, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make(
    name: str, collected: Collected, stored: Mapping[str, StoredTensor], work: Path, kind: str
) -> Path:
    """The adapter's two files, in a folder of their own."""
    made = work / "made"
    if kind != "native":
        try:
            made.mkdir()
            peft_type = collected.config.peft_type
            adapter = _adapter(collected, stored, work)
            peft_write.write(adapter, made, peft_type)
        except UsageError as error:
            if kind == "peft":
                hint = 'Save it with format="native"'
                raise UsageError(f"{name!r}: {error.message}", hint=hint) from error
            warnings.warn(
                f"{name!r} is saved in the Bone Adapter Format, which boneconv reads and PEFT "
                f"refuses: {error.message}",
                stacklevel=6,
            )
            made.rmdir()
        else:
            return made
    write_native(_native(collected, stored), made)
    return made


def _adapter(collected: Collected, stored: Mapping[str, StoredTensor], work: Path) -> Adapter:
    """What PEFT's layout is written from."""
    numbers = [t for n, t in stored.items() if n in collected.saved() and not _is_float(t)]
    if numbers:
        raise UsageError(f"a saved module holds numbers that are not floating: {numbers[0].name}")
    blocks = {
        module: Block(
            module,
            spec.variant,
            spec.axis,
            stored[f"{module}.{BLOCK}"],
            spec.rank,
            spec.mini_rank,
            collected.shapes[module],
        )
        for module, spec in collected.layers.items()
    }
    saved = {n: stored[n] for n in collected.saved()}
    return Adapter(work, work, "peft", _listed(collected), blocks, saved)


def _is_float(tensor: StoredTensor) -> bool:
    return tensor.dtype in ("F64", "F32", "F16", "BF16")


def _listed(collected: Collected) -> BoneConfig:
    """The configuration with a list of the modules where PEFT could choose others by it."""
    config = collected.config
    targets = config.target_modules
    shorthand = isinstance(targets, str) and targets.lower() == "all-linear"
    config = replace(config, inference_mode=True)
    if targets is None or shorthand or config.layers_to_transform is not None:
        # write() lists the modules of a configuration without target_modules.
        return replace(
            config,
            target_modules=None,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
    return config


def _native(collected: Collected, stored: Mapping[str, StoredTensor]) -> NativeAdapter:
    config, layers = collected.config, collected.layers
    own_biases = {f"{module}.bias" for module in layers} & set(collected.biases)
    replaced = {m: tuple(sorted(own)) for m, own in collected.copies.items()}
    for bias in sorted(set(collected.biases) - own_biases):
        module, _, leaf = bias.rpartition(".")
        replaced[module] = (*replaced.get(module, ()), leaf)
    mini, bat = config.variant is Variant.MINI, config.variant is Variant.BAT
    modules = {
        name: Module(
            rank=spec.rank,
            mini_rank=spec.mini_rank if mini else None,
            bias=True if f"{name}.bias" in own_biases else None,
            base_shape=collected.shapes[name],
        )
        for name, spec in layers.items()
    }
    metadata = Metadata(
        variant=config.variant,
        modules=modules,
        axis=next(iter(layers.values())).axis if bat else None,
        replaced=replaced or None,
        added=tuple(sorted(collected.copies)) or None,
    )
    tensors = {f"{PREFIX}{name}": stored[name] for name in stored}
    free = {name: getattr(config, name) for name in FREE_FIELDS} | {"inference_mode": True}
    return NativeAdapter(metadata, tensors, {k: v for k, v in free.items() if FREE_FIELDS[k][0](v)})


def _publish(made: Path, folder: Path) -> None:
    """Moves the two files over older ones.

    A configuration that is another one goes first: whoever reads in between, or after a crash,
    finds weights without a configuration, and not with a wrong one.
    """
    with machine_errors(folder):
        new, old = made / CONFIG_NAME, folder / CONFIG_NAME
        if old.exists() and old.read_bytes() != new.read_bytes():
            old.unlink()
            sync_folder(folder)
        os.replace(made / SAFETENSORS_NAME, folder / SAFETENSORS_NAME)  # noqa: PTH105
        new.replace(old)
        sync_folder(folder)


def _spec(update: Update) -> LayerSpec:
    mini = update.block.shape[1] if update.variant is Variant.MINI else 1
    return LayerSpec(update.rank, update.variant, update.axis, mini)


def _whole(path: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with its values, on the CPU; a sharded one is gathered."""
    gather = getattr(tensor, "full_tensor", None)
    tensor = tensor.detach() if gather is None else gather().detach()
    if tensor.is_meta:
        raise ConfigError(
            "a parameter of the adapter has no values yet",
            found=f"{path} on the meta device",
            hint="Load a state dict with assign=True first",
        )
    if tensor.dtype not in SAFETENSORS_DTYPES:
        raise ConfigError(f"{path} has a dtype that cannot be saved", found=str(tensor.dtype))
    return tensor.cpu()
