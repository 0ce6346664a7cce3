"""The base that an adapter is converted for: the shapes, and where needed the values, it adapts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from boneconv.adapter import Adapter
from boneconv.errors import BaseMismatchError, NameMatchError, UsageError, listing
from boneconv.formats.native import check_homes, find_homes, fingerprint, mismatch
from boneconv.io.checkpoint import Checkpoint, open_checkpoint
from boneconv.io.hub import BASE, Source, locate
from boneconv.io.quantised import refuse_quantised_tensors
from boneconv.io.safetensors import Tensor
from boneconv.io.weight_files import holds_weights
from boneconv.names import parameter_shapes, trained_on

__all__ = ["AdaptedWeights", "adapted_weights", "check_fingerprint", "open_base"]

_CONFIG = "config.json"


@dataclass(frozen=True)
class AdaptedWeights:
    """The weights that an adapter's blocks belong to.

    Attributes:
        shapes: The shape of each adapted module's weight, ``[out, in]`` or ``[out, in, 1, 1]``.
        tensors: The weights themselves, where the base has been given with its weights.
        source: Where the base came from.
    """

    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    source: Source | None = None


def adapted_weights(adapter: Adapter, base: str | os.PathLike[str] | None) -> AdaptedWeights:
    """Finds the weight of every adapted module; reads headers only.

    Args:
        adapter: The adapter.
        base: A folder, a file or a Hub id; a folder with a config.json alone, or that file, gives
            shapes without weights. None takes the shapes that the adapter itself records.

    Raises:
        UsageError: No base was given, and the adapter does not say what it was made for.
        NameMatchError, ShapeError: The base lacks a tensor that the adapter changes, or has one of
            another shape or dtype.
        MissingPathError, FormatError, MissingExtraError, NetworkError: The base cannot be opened.
    """
    if base is None:
        return AdaptedWeights(_recorded_shapes(adapter))
    source = locate(base, BASE)
    config = _config_alone(source.path)
    if config is not None:
        return AdaptedWeights(_configured_shapes(adapter, config), {}, source)
    checkpoint = open_checkpoint(source.path)
    refuse_quantised_tensors(checkpoint.tensors, source.path)
    homes = find_homes(adapter, checkpoint)
    check_homes(adapter, homes)
    names = {module: f"{module}.weight" for module in adapter.blocks}
    tensors = {module: adapter.saved.get(name, homes[name]) for module, name in names.items()}
    return AdaptedWeights({name: t.shape for name, t in tensors.items()}, tensors, source)


def open_base(base: str | os.PathLike[str]) -> tuple[Source, Checkpoint]:
    """Opens a base with its weights; raises as `adapted_weights`."""
    source = locate(base, BASE)
    return source, open_checkpoint(source.path)


def check_fingerprint(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Holds a base against the digests that an adapter names; reads the adapted weights.

    Raises:
        BaseMismatchError: They differ.
    """
    if not adapter.base_digests:
        return
    digests = {f"{k}.weight": v.digest for k, v in fingerprint(checkpoint, adapter).items()}
    found = mismatch(adapter, digests)
    if found is not None:
        raise BaseMismatchError(
            found.message, path=found.path, hint="Give the base that the adapter was made for"
        )


def _recorded_shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    shapes = {b.module: b.base_shape for b in adapter.blocks.values() if b.base_shape is not None}
    if len(shapes) < len(adapter.blocks):
        raise UsageError(
            "the adapter does not say how wide the weights are that it changes",
            path=adapter.path,
            hint="Give the base with --base; a folder with its config.json is enough for Bone",
        )
    return shapes


def _config_alone(path: Path) -> Path | None:
    """The config.json of a base that comes without weights."""
    if path.is_file():
        return path if path.name == _CONFIG else None
    return path / _CONFIG if (path / _CONFIG).is_file() and not holds_weights(path) else None


def _configured_shapes(adapter: Adapter, config: Path) -> dict[str, tuple[int, ...]]:
    names = {f"{module}.weight": module for module in adapter.blocks}
    classes = trained_on(adapter.config.task_type, adapter.config.auto_mapping)
    found = parameter_shapes(names, config, architectures=classes)
    lost = [name for name in names if name not in found]
    if lost:
        raise NameMatchError(
            f"{len(lost)} of the {len(names)} weights that the adapter changes are not in the "
            f"model that the configuration describes: {listing(lost)}",
            path=config,
            hint="Is this the base that the adapter was trained on?",
        )
    return {names[name]: shape for name, shape in found.items()}
