"""`AdaptedModel`: the state of a model with adapters, and how it is carried into its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from boneconv.adapter import Adapter
from boneconv.config import BoneConfig
from boneconv.errors import ConfigError
from boneconv.nn.linear import BoneLinear
from boneconv.nn.model.attaching import (
    LayerSpec,
    attach_blocks,
    attach_copies,
    detach,
    warn_of_ties,
)
from boneconv.nn.model.base_state import leave_out_base
from boneconv.nn.model.biases import TrainedBiases, bias_places
from boneconv.nn.model.loading import Contents, read_contents
from boneconv.nn.model.saved_module import SavedModule
from boneconv.nn.model.signature import rebuild, wrapper_for
from boneconv.nn.model.tied_state import hold_once
from boneconv.nn.model.walking import bone_layers, saved_modules, walk

__all__ = ["AdaptedModel"]


class AdaptedModel(torch.nn.Module):
    """A model with adapters in it; `boneconv.BoneModel` is how it is used.

    Attributes:
        model: The model.
        peft_config: The configurations by adapter.
        base_in_state_dict: Whether ``state_dict`` holds the base's own parameters too.
    """

    base_in_state_dict: bool = True
    model: torch.nn.Module
    wraps: ClassVar[tuple[type[torch.nn.Module], type[torch.nn.Module]]]

    def _begin(self, model: torch.nn.Module) -> None:
        """A model without adapters."""
        super().__init__()
        if isinstance(model, AdaptedModel) or any(
            isinstance(module, BoneLinear | SavedModule) for _, module in walk(model)
        ):
            raise ConfigError(
                "the model carries adapters already", hint="Add another with add_adapter"
            )
        self.__class__ = wrapper_for(type(self), type(model))
        self.model = model
        self.training = model.training
        self.peft_config: dict[str, BoneConfig] = {}
        self._active: tuple[str, ...] = ()
        self._enabled = True
        self._biases: dict[str, TrainedBiases] = {}
        hold_once(self)
        leave_out_base(self)
        self._trained_before = {n for n, p in model.named_parameters() if p.requires_grad}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the adapted model gives for the arguments."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):
                raise
            return getattr(self.model, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        wraps = type(self).__dict__.get("wraps")
        if wraps is None:  # a class that was put before ours, such as FSDP2's
            return super().__reduce_ex__(protocol)
        return rebuild, wraps, self.__dict__

    def _attach(
        self,
        name: str,
        config: BoneConfig,
        specs: Mapping[str, LayerSpec],
        copies: tuple[str, ...],
        *,
        meta_blocks: bool,
        meta_copies: bool,
        dtype: torch.dtype | None = None,
        contents: Contents | None = None,
    ) -> None:
        """Adds an adapter, whole or not at all."""
        self._check_config(config)
        modules = dict(walk(self.model))
        warn_of_ties(self.model, {each: modules[each] for each in (*specs, *copies)})
        self.peft_config[name] = config
        try:
            attach_blocks(self.model, name, specs, meta=meta_blocks, dtype=dtype)
            attach_copies(self.model, name, {c: modules[c] for c in copies}, meta=meta_copies)
            if config.bias != "none":
                places = bias_places(self.model, config.bias, name, copies)
                self._biases[name] = TrainedBiases(places)
            if contents is not None:
                contents.assign(self.model, name, self._biases.get(name))
        except BaseException:
            self._drop(name)
            raise
        self._update()

    def _attach_file(self, name: str, adapter: Adapter, is_trainable: bool) -> None:
        contents = read_contents(self.model, adapter)
        config = replace(contents.config, inference_mode=not is_trainable)
        copies = tuple(contents.copies)
        self._attach(
            name,
            config,
            contents.specs,
            copies,
            meta_blocks=True,
            meta_copies=False,
            contents=contents,
        )

    def _check_config(self, config: BoneConfig) -> None:
        if not isinstance(config, BoneConfig):
            raise ConfigError(
                "no configuration of Bone",
                expected="a boneconv.BoneConfig",
                found=f"{type(config).__module__}.{type(config).__qualname__}",
            )
        if config.bias != "none" and self._biases:
            raise ConfigError(
                f"{next(iter(self._biases))!r} trains biases already, and there is one set of them",
                hint='Give the new adapter bias="none"',
            )

    def _drop(self, name: str) -> None:
        """Takes an adapter out of everything, also where it is there in part."""
        biases = self._biases.pop(name, None)
        if biases is not None:
            biases.put(False)
        for layer in bone_layers(self.model).values():
            if name in layer.merged_adapters:
                others = [other for other in layer.merged_adapters if other != name]
                layer.unmerge()
                layer.merge(names=others)
        detach(self.model, name)
        self.peft_config.pop(name, None)

    def _update(self, *, gradients: bool = True) -> None:
        """Carries what is active and enabled into the modules."""
        merged: set[str] = set()
        for layer in bone_layers(self.model).values():
            layer.set_adapter(self._active)
            layer.enable_adapters(self._enabled)
            merged.update(layer.merged_adapters)
        for holder in saved_modules(self.model).values():
            holder.active = next((n for n in self._active if n in holder.modules_to_save), None)
            holder.enabled = self._enabled
        for name, biases in self._biases.items():
            biases.put(self._enabled and (name in self._active or name in merged))
        if gradients:
            self._update_gradients()

    def _update_gradients(self) -> None:
        self.model.requires_grad_(False)
        trained = [name for name in self._active if not self.peft_config[name].inference_mode]
        for layer in bone_layers(self.model).values():
            for name in trained:
                if name in layer.bone_block:
                    layer.bone_block[name].requires_grad_(True)
        for holder in saved_modules(self.model).values():
            for name in trained:
                if name in holder.modules_to_save:
                    holder.modules_to_save[name].requires_grad_(True)
        for name in trained:
            for _, bias in self._biases[name].parameters() if name in self._biases else ():
                bias.requires_grad_(True)

    def _end(self) -> torch.nn.Module:
        self.peft_config = {}
        self._active, self._biases, self._enabled = (), {}, True
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._trained_before)
        return self.model
