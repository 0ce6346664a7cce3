"""`NativeAdapter`: what the two files of a native adapter hold, and the `Adapter` that it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from boneconv.adapter import NATIVE, Adapter, Block
from boneconv.config import Axis, BoneConfig, Variant
from boneconv.formats.native.metadata import Metadata
from boneconv.formats.native.peft_config import FREE_FIELDS
from boneconv.formats.native.tensors import BLOCK, PREFIX
from boneconv.io.safetensors import Tensor

__all__ = ["NativeAdapter", "to_adapter"]


@dataclass(frozen=True)
class NativeAdapter:
    """A native adapter's content.

    Attributes:
        metadata: What it says about itself.
        tensors: Its tensors under their names in the file, ``base_model.model.<name>``.
        free: The fields of adapter_config.json that do not matter to the adapter: the base's name
            and revision, the task type and the like; empty for a file alone.
    """

    metadata: Metadata
    tensors: Mapping[str, Tensor]
    free: Mapping[str, Any] = field(default_factory=dict)

    def block(self, module: str) -> Tensor:
        """The block of a module."""
        return self.tensors[f"{PREFIX}{module}.{BLOCK}"]

    @property
    def saved(self) -> dict[str, Tensor]:
        """Biases and replaced tensors, by their names in the model."""
        names = (*self.metadata.biases, *self.metadata.replaced_names)
        return {name: self.tensors[PREFIX + name] for name in names}


def to_adapter(
    native: NativeAdapter, path: Path, weights: Path, side_files: tuple[Path, ...] = ()
) -> Adapter:
    """The adapter that some native content is.

    Args:
        native: Content that keeps the rules.
        path: The folder or file that it came from.
        weights: The file that holds its tensors.
        side_files: Tokenizer files that lie beside it.
    """
    metadata = native.metadata
    axis = metadata.axis or Axis.OUT
    blocks = {
        name: Block(
            name,
            metadata.variant,
            axis,
            native.block(name),
            module.rank,
            module.mini_rank or 1,
            module.base_shape,
        )
        for name, module in metadata.modules.items()
    }
    return Adapter(
        path,
        weights,
        NATIVE,
        _config(native),
        blocks,
        native.saved,
        side_files,
        scale=1.0 if metadata.scale is None else float(metadata.scale),
        may_add=metadata.added or (),
        vocab_size=metadata.vocab_size,
        fingerprint=metadata.fingerprint,
        base_digests={
            f"{name}.weight": module.base_digest
            for name, module in metadata.modules.items()
            if module.base_digest is not None
        },
    )


def _config(native: NativeAdapter) -> BoneConfig:
    """The configuration in PEFT's terms; `r` is the largest rank."""
    metadata, bone = native.metadata, native.metadata.variant is Variant.BONE
    mini_ranks = [module.mini_rank or 1 for module in metadata.modules.values()]
    info = {name: (metadata.info or {}).get(name) for name in FREE_FIELDS}
    known = {name: value for name, value in info.items() if FREE_FIELDS[name][0](value)}
    free = {**known, **{name: v for name, v in native.free.items() if v is not None}}
    return BoneConfig(
        peft_type="MISS" if metadata.variant is Variant.MINI else "BONE",
        r=metadata.ranks[-1],
        mini_r=max(mini_ranks),
        init_weights=True if bone else str(metadata.variant),
        target_modules=tuple(sorted(metadata.modules)),
        modules_to_save=tuple(sorted(metadata.replaced or ())) or None,
        axis=metadata.axis or Axis.OUT,
        task_type=free.get("task_type"),
        auto_mapping=free.get("auto_mapping"),
        base_model_name_or_path=free.get("base_model_name_or_path"),
        revision=free.get("revision"),
        inference_mode=free.get("inference_mode", True),
    )
