"""Converting an adapter to the Bone Adapter Format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from boneconv.adapter import Adapter
from boneconv.config import Axis, Variant
from boneconv.conversion.base import check_fingerprint, open_base
from boneconv.digest import same_values
from boneconv.errors import UsageError, listing
from boneconv.formats.native import (
    BaseTensor,
    Metadata,
    Module,
    NativeAdapter,
    check_homes,
    find_homes,
    fingerprint,
    open_native,
    write_native,
)
from boneconv.formats.native.metadata import root_of
from boneconv.formats.native.peft_config import FREE_FIELDS
from boneconv.formats.native.tensors import BLOCK, PREFIX
from boneconv.io.hub import Source
from boneconv.io.safetensors import StoredTensor, Tensor

__all__ = ["to_native"]


def to_native(
    adapter: Adapter, out: Path, base: str | os.PathLike[str] | None, *, force: bool
) -> Source | None:
    """Writes a native adapter, with its base's fingerprint where a base is given.

    Args:
        adapter: An adapter of any format.
        out: A folder, or a name that ends in ``.safetensors``.
        base: The base that the adapter was made for.
        force: Whether to replace ``out``.

    Returns:
        Where the base came from.

    Raises:
        UsageError: The adapter holds what the format does not.
        BaseMismatchError: The base is not the one that the adapter already names.
        InputError, CheckFailedError, MachineError: As `write_native`.
    """
    source, homes, digests = None, None, None
    if base is not None:
        source, checkpoint = open_base(base)
        homes = find_homes(adapter, checkpoint)
        check_homes(adapter, homes)
        check_fingerprint(adapter, checkpoint)
        digests = fingerprint(checkpoint, adapter)
    content = open_native(adapter.path).content if adapter.is_native else _content(adapter, homes)
    if digests is not None:
        content = replace(content, metadata=_with_fingerprint(content.metadata, digests))
    if out.suffix == ".safetensors":
        content = replace(content, metadata=_with_info(content.metadata, content.free), free={})
    files = {p.relative_to(adapter.path).as_posix(): p for p in adapter.side_files}
    write_native(content, out, side_files=files, force=force)
    return source


def _content(adapter: Adapter, homes: Mapping[str, StoredTensor] | None) -> NativeAdapter:
    saved = _without_bases(adapter, homes)
    biases = {f"{module}.bias" for module in adapter.blocks} & set(saved)
    replaced: dict[str, tuple[str, ...]] = {}
    for name in sorted(set(saved) - biases):
        module = _replaced_module(name, adapter.config.modules_to_save or ())
        leaf = name.removeprefix(f"{module}.")
        replaced[module] = (*replaced.get(module, ()), leaf)
    bat = adapter.config.variant is Variant.BAT
    metadata = Metadata(
        variant=adapter.config.variant,
        modules=_modules(adapter, biases),
        axis=_axis(adapter) if bat else None,
        scale=None if adapter.scale == 1.0 else adapter.scale,
        replaced=replaced or None,
        added=_added(adapter, replaced, homes) or None,
        vocab_size=adapter.vocab_size or _vocabulary(saved, homes),
    )
    blocks = {f"{PREFIX}{b.module}.{BLOCK}": b.tensor for b in adapter.blocks.values()}
    tensors = blocks | {PREFIX + name: tensor for name, tensor in saved.items()}
    return NativeAdapter(metadata, tensors, _free_fields(adapter))


def _axis(adapter: Adapter) -> Axis:
    return next((b.axis for b in adapter.blocks.values()), adapter.config.axis)


def _modules(adapter: Adapter, biases: set[str]) -> dict[str, Module]:
    mini = adapter.config.variant is Variant.MINI
    return {
        block.module: Module(
            rank=block.rank,
            mini_rank=block.mini_rank if mini else None,
            bias=True if f"{block.module}.bias" in biases else None,
            base_shape=block.base_shape,
        )
        for block in adapter.blocks.values()
    }


def _without_bases(adapter: Adapter, homes: Mapping[str, StoredTensor] | None) -> dict[str, Tensor]:
    """The saved tensors, without copies of the base's weights that lie below a block.

    PEFT saves the weight below a block where that is an output head; mostly it is the base's.
    """
    below = [f"{module}.weight" for module in adapter.blocks if f"{module}.weight" in adapter.saved]
    own = [n for n in below if homes is None or not same_values(adapter.saved[n], homes[n])]
    if own:
        raise UsageError(
            f"the adapter brings the weight below a block: {listing(own)}",
            path=adapter.path,
            hint="Give the base with --base: where the two are equal, it is left out"
            if homes is None
            else "A native adapter either adapts a weight or replaces it; merge this one instead",
        )
    return {name: tensor for name, tensor in adapter.saved.items() if name not in below}


def _replaced_module(name: str, saved_modules: tuple[str, ...]) -> str:
    """The module that a saved tensor belongs to: one of ``modules_to_save``, or its parent."""
    parents = name.split(".")[:-1]
    for end in range(1, len(parents)):
        path = ".".join(parents[:end])
        if any(path == module or path.endswith(f".{module}") for module in saved_modules):
            return path
    return ".".join(parents)


def _added(
    adapter: Adapter,
    replaced: Mapping[str, tuple[str, ...]],
    homes: Mapping[str, StoredTensor] | None,
) -> tuple[str, ...]:
    """The replaced modules that the base need not have: lacks, or may lack as far as one knows."""
    return tuple(
        module
        for module, leaves in replaced.items()
        if any(f".{m}." in f".{module}." for m in adapter.may_add)
        and (homes is None or any(f"{module}.{leaf}" not in homes for leaf in leaves))
    )


def _vocabulary(
    saved: Mapping[str, Tensor], homes: Mapping[str, StoredTensor] | None
) -> int | None:
    """The rows of embeddings that are not as tall as the base's."""
    rows = {
        tensor.shape[0]
        for name, tensor in saved.items()
        if homes is not None and name in homes and tensor.shape != homes[name].shape
    }
    return rows.pop() if len(rows) == 1 else None


def _free_fields(adapter: Adapter) -> dict[str, Any]:
    values = {name: getattr(adapter.config, name) for name in FREE_FIELDS}
    return {name: value for name, value in values.items() if FREE_FIELDS[name][0](value)}


def _with_fingerprint(metadata: Metadata, digests: Mapping[str, BaseTensor]) -> Metadata:
    modules = {
        name: replace(
            module,
            base_shape=digests[name].shape,
            base_dtype=digests[name].dtype,
            base_digest=digests[name].digest,
        )
        for name, module in metadata.modules.items()
    }
    return replace(metadata, modules=modules, fingerprint=root_of(modules))


def _with_info(metadata: Metadata, free: Mapping[str, Any]) -> Metadata:
    """A file alone has no adapter_config.json: what stood there goes into the information."""
    known = {k: v for k, v in free.items() if v is not None and k != "inference_mode"}
    return replace(metadata, info={**known, **(metadata.info or {})} or None)
