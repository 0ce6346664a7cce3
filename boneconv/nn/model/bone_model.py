"""`BoneModel`: a model with Bone, BAT and mini adapters, to train, apply, merge and save.

The reference implementation of what PEFT 0.14 to 0.18 called ``BoneModel`` (arXiv 2409.15371), and
of what MiSS added to it.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import torch

from boneconv.config import BoneConfig
from boneconv.errors import ConfigError, listing
from boneconv.formats import load_adapter
from boneconv.nn.model.adapted import AdaptedModel
from boneconv.nn.model.attaching import spec_of
from boneconv.nn.model.naming import check_names, check_new_name, chosen_names
from boneconv.nn.model.saving import Collected, collect, save_adapters, with_origin
from boneconv.nn.model.targets import find_saved, find_targets
from boneconv.nn.model.unloading import (
    merge_and_restore,
    merge_layers,
    restore_modules,
    unmerge_layers,
)
from boneconv.nn.model.walking import bone_layers, saved_modules

__all__ = ["BoneModel"]


class BoneModel(AdaptedModel):
    """A model and the adapters that change it.

    The model is changed in place: its adapted layers become `BoneLinear`, modules that are trained
    in full `SavedModule`. Only the parameters of active adapters require a gradient (none of those
    whose configuration has ``inference_mode``). Attributes that this class does not have are the
    model's, so that it is used as the model was: ``generate``, ``config``, ``dtype``.

    ``state_dict`` holds the model and all adapters (what is tied, once); loading it into a
    `BoneModel` that was made from the same base and configurations resumes training exactly.
    This is what the checkpoints of transformers' Trainer and of accelerate hold: to resume, make
    the `BoneModel` again and give them the checkpoint. With ``base_in_state_dict = False`` they
    hold what the adapters train, and no base. After training, `save_pretrained` saves the adapter.

    Args:
        model: The model.
        peft_config: The configuration of one adapter, or of several by name.
        adapter_name: The name of the one, or which of the several is active.
        low_cpu_mem_usage: Make the new parameters on the meta device, without memory or values,
            for ``load_state_dict(..., assign=True)``.
        dtype: The dtype of the blocks; each that of its layer's weight by default.

    Attributes:
        model: The model that was given, now adapted.
        peft_config: The configurations by adapter.
        base_in_state_dict: Whether ``state_dict`` holds the base's own parameters too; true unless
            it is set otherwise. Without them it is as small as the adapters, and loading it leaves
            the base's parameters as they are.

    Raises:
        ConfigError: A configuration does not fit the model (`find_targets`), a name cannot be, or
            the model carries adapters already. The model is then as it was.
        ShapeError: A rank does not fit a weight; the model is as it was.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        peft_config: BoneConfig | Mapping[str, BoneConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        configs = (
            {adapter_name: peft_config} if not isinstance(peft_config, Mapping) else {**peft_config}
        )
        if adapter_name not in configs:
            raise ConfigError(
                "adapter_name is none of those in peft_config",
                expected=listing(list(configs)),
                found=repr(adapter_name),
            )
        self._begin(model)
        try:
            for name, config in configs.items():
                self.add_adapter(name, config, low_cpu_mem_usage=low_cpu_mem_usage, dtype=dtype)
            self.set_adapter(adapter_name)
        except BaseException:
            self.unload()
            raise

    @classmethod
    def from_pretrained(
        cls,
        model: torch.nn.Module,
        adapter: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> Self:
        """A model with an adapter from a file.

        Args:
            model: The model that the adapter was trained on.
            adapter: A folder, a file or a Hub id ``owner/name[@revision]``, of any format that
                `boneconv.load_adapter` reads.
            adapter_name: The name to give the adapter.
            is_trainable: Whether to go on training it. Otherwise it is frozen and the model is put
                into eval mode.

        Raises:
            NameMatchError: The adapter is for modules that the model does not have.
            InputError, MachineError: As `load_adapter`, and as the class.
        """
        bone = cls.__new__(cls)
        bone._begin(model)
        bone.load_adapter(adapter, adapter_name, is_trainable=is_trainable)
        bone.set_adapter(adapter_name)
        if not is_trainable:
            bone.eval()
        return bone

    # Adapters

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are applied, in the order in which they are."""
        return list(self._active)

    def add_adapter(
        self,
        adapter_name: str,
        config: BoneConfig,
        *,
        low_cpu_mem_usage: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Adds an adapter; `set_adapter` makes it active.

        Args:
            adapter_name: A new name, without dots and slashes.
            config: Its configuration.
            low_cpu_mem_usage: As for the class.
            dtype: As for the class.

        Raises:
            ConfigError, ShapeError: As for the class; the model is as it was.
        """
        check_new_name(adapter_name, self.peft_config)
        self._check_config(config)
        targets = find_targets(self.model, config)
        saved = find_saved(self.model, config)
        self._attach(
            adapter_name,
            config,
            dict.fromkeys(targets, spec_of(config)),
            tuple(saved),
            meta_blocks=low_cpu_mem_usage,
            meta_copies=low_cpu_mem_usage,
            dtype=dtype,
        )

    def load_adapter(
        self,
        adapter: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
    ) -> None:
        """Adds an adapter from a file; `set_adapter` makes it active.

        Blocks have the file's dtype, one of its layers may have another rank than the next. A
        strength (``scale``) in the file goes into the blocks: all updates are linear in them.

        Args:
            adapter: As in `from_pretrained`.
            adapter_name: A new name.
            is_trainable: Whether it is trained where it is active.

        Raises:
            NameMatchError: The adapter is for modules that the model does not have.
            InputError, MachineError: As `boneconv.load_adapter`; the model is as it was.
        """
        check_new_name(adapter_name, self.peft_config)
        self._attach_file(adapter_name, load_adapter(adapter), is_trainable)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Makes adapters active, in the order in which they are applied; the others are not.

        Raises:
            ConfigError: There is no such adapter, one is named twice, or two of them train the same
                module in full. Nothing has changed.
        """
        names = chosen_names(adapter_name)
        check_names(names, self.peft_config)
        for module, holder in saved_modules(self.model).items():
            both = [name for name in names if name in holder.modules_to_save]
            if len(both) > 1:
                raise ConfigError(
                    f"several adapters train {module!r} in full: {listing(both)}",
                    hint="Make one of them active at a time",
                )
        self._active = names
        self._update()

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, and takes it out of the weights where it is merged.

        Where no other is active, the first of the others becomes so, as in PEFT.

        Raises:
            ConfigError: There is no such adapter.
        """
        check_names((adapter_name,), self.peft_config)
        self._drop(adapter_name)
        self._active = tuple(name for name in self._active if name != adapter_name)
        if not self._active and self.peft_config:
            self._active = (next(iter(self.peft_config)),)
            warnings.warn(
                f"the active adapter {adapter_name!r} was deleted; {self._active[0]!r} is active "
                "now",
                stacklevel=2,
            )
        self._update()

    def enable_adapters(self, enabled: bool = True) -> None:
        """Applies the active adapters again after `disable_adapters`."""
        self._enabled = enabled
        self._update(gradients=False)

    def disable_adapters(self) -> _Disabled:
        """Makes the model what it was without adapters, merged ones and trained biases included.

        Until `enable_adapters`; or, where the result is used in a ``with`` statement, until its
        end.
        """
        before = self._enabled
        self.enable_adapters(False)
        return _Disabled(self, before)

    def disable_adapter(self) -> _Disabled:
        """`disable_adapters`, under the name of PEFT's context manager."""
        return self.disable_adapters()

    def cache_weights(self, enabled: bool = True) -> None:
        """Keeps the updated weight of each adapted layer between calls, or stops it.

        In eval mode, where no gradient is wanted, at the memory of the adapted weights once more:
        see `BoneLinear.cache_weight`. Layers that are adapted later do not keep theirs.
        """
        for layer in bone_layers(self.model).values():
            layer.cache_weight = enabled

    # Merging

    def merge_adapter(
        self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merges adapters into the weights; `unmerge_adapter` puts the old ones back, to the bit.

        Args:
            adapter_names: The adapters, in order; the active ones by default.
            safe_merge: Check all layers before the first is changed.

        Raises:
            ConfigError: There is no such adapter, or a weight's dtype cannot be merged.
            NonFiniteError: ``safe_merge``, and something is not finite; it is a ValueError.
        """
        names = self._active if adapter_names is None else chosen_names(adapter_names)
        check_names(names, self.peft_config)
        if names and not merge_layers(self.model, names, safe_merge=safe_merge):
            warnings.warn(f"merged already: {listing(list(names))}", stacklevel=2)
        self._update(gradients=False)

    def unmerge_adapter(self) -> None:
        """Takes all merged adapters out of the weights again; warns where there are none."""
        if not unmerge_layers(self.model):
            warnings.warn("no adapter is merged", stacklevel=2)
        self._update(gradients=False)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
    ) -> torch.nn.Module:
        """Merges adapters for good and gives the plain model, the one that was given to the class.

        Its parameters require a gradient as they did before. Adapters that were merged stay so.

        Args:
            progressbar: Whether to show one, where stderr is a terminal.
            safe_merge: Check all layers before the first is changed.
            adapter_names: The adapters, in order; the active ones by default.

        Returns:
            The model; this object has no adapters any more.

        Raises:
            ConfigError, NonFiniteError: As `merge_adapter`.
        """
        names = self._active if adapter_names is None else chosen_names(adapter_names)
        self.set_adapter(names)
        self.enable_adapters()
        merge_and_restore(self.model, names, safe_merge=safe_merge, progressbar=progressbar)
        return self._end()

    def unload(self) -> torch.nn.Module:
        """The model as it was, its weights to the bit; this object has no adapters any more."""
        self._active = ()
        restore_modules(self.model)
        self._update(gradients=False)
        return self._end()

    # Files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: Sequence[str] | None = None,
        *,
        format: str = "auto",  # noqa: A002
        state_dict: Mapping[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Saves adapters: ``default`` into the folder, others into folders of their names in it.

        Each gets adapter_config.json and adapter_model.safetensors, which replace older ones, whole
        or not at all; other files in the folder stay. Sharded parameters (DTensor) are gathered, so
        every process of a group has to call this.

        Args:
            save_directory: The folder; it is made if need be.
            selected_adapters: The adapters; all by default.
            format: ``peft`` is PEFT's, which `boneconv` reads as well; ``native`` the Bone Adapter
                Format; ``auto`` PEFT's where that can say what the adapter does, else native.
            state_dict: Take values from this state dict of the whole `BoneModel`.
            is_main_process: Whether this process writes.

        Raises:
            ConfigError: There is no such adapter, or a parameter has no values (meta device).
            UsageError: An unknown format, or ``peft`` for an adapter that it cannot hold.
            DiskFullError, MachineError: The folder cannot be written.
        """
        names = (
            tuple(self.peft_config)
            if selected_adapters is None
            else (chosen_names(selected_adapters))
        )
        check_names(names, self.peft_config)
        save_adapters(
            {name: self._collect(name, state_dict) for name in names},
            os.fspath(save_directory),
            format=format,
            write=is_main_process,
        )

    def _collect(self, name: str, state_dict: Mapping[str, torch.Tensor] | None) -> Collected:
        config = with_origin(self.peft_config[name], self.model, self.wraps[1])
        return collect(self.model, name, config, self._biases.get(name), state_dict)

    # Numbers

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Prints those two numbers and their ratio."""
        trained, total = self.get_nb_trainable_parameters()
        share = 100 * trained / total if total else 0.0
        sys.stdout.write(f"trainable parameters: {trained:,} of {total:,} ({share:.4f} %)\n")


class _Disabled:
    """What `BoneModel.disable_adapters` gives: as a context manager, it enables them again."""

    def __init__(self, model: BoneModel, before: bool) -> None:
        self._model = model
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._model.enable_adapters(self._before)
