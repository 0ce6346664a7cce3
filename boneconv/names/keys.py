"""Adapter file keys, freed from the segments that wrappers put into them."""

from __future__ import annotations

__all__ = ["module_key"]

_PEFT_PREFIX = ("base_model", "model")

#: Segments that a wrapper adds wherever it stands: torch.compile, FSDP, activation checkpointing,
#: PEFT's layers and its copies of saved modules.
_WRAPPERS = frozenset(
    {
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
        "_orig_mod",
        "base_layer",
        "modules_to_save",
        "original_module",
    }
)

#: In a model's own state dict the adapter's name follows these; in a saved adapter it does not.
_HOLDERS = frozenset({"bone_block", "miss_block", "modules_to_save"})
_ADAPTER_NAME = "default"


def module_key(key: str) -> str:
    """The name in the model's own namespace of what an adapter file calls ``key``.

    Removes ``base_model.model.`` once, at the front (and the ``module.`` of DistributedDataParallel
    before it), and wrapper segments anywhere: ``_orig_mod``, ``_fsdp_wrapped_module``,
    ``_checkpoint_wrapped_module``, ``base_layer``, ``modules_to_save``, ``original_module``, and
    the adapter name ``default`` behind ``modules_to_save``, ``bone_block`` or ``miss_block``. Only
    whole segments are removed. What stands at the end (``.weight``, ``.bone_block``) stays.

    Two keys may come out equal, a trained copy and the frozen one under ``original_module`` or
    ``base_layer`` for example: the caller has to refuse that.
    """
    kept: list[str] = []
    previous = ""
    for segment in key.split("."):
        is_adapter_name = segment == _ADAPTER_NAME and previous in _HOLDERS
        if segment not in _WRAPPERS and not is_adapter_name:
            kept.append(segment)
        if segment not in _WRAPPERS or segment in _HOLDERS:
            previous = segment
    if tuple(kept[:3]) == ("module", *_PEFT_PREFIX):
        del kept[0]
    if tuple(kept[:2]) == _PEFT_PREFIX:
        del kept[:2]
    return ".".join(kept)
