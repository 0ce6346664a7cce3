"""The metadata of a native adapter, typed (specification, section 5).

A field that is absent is None, so that what was read is written again as it was; the properties
give what absence means. Fields that version 1.0 does not know are kept beside the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import blake3

from boneconv.config import Axis, Variant
from boneconv.formats.native.canonical import encode

__all__ = ["ALGORITHM", "FORMAT_VERSION", "METADATA_KEY", "Metadata", "Module", "root_of"]

FORMAT_VERSION = "1.0"
#: The key of the safetensors header's metadata that holds all of it.
METADATA_KEY = "bone_adapter"
#: The fingerprint's algorithm (section 9).
ALGORITHM = "blake3-1m"


@dataclass(frozen=True)
class Module:
    """An adapted module (section 5.4).

    Attributes:
        rank: r.
        mini_rank: The columns of a mini block.
        bias: Whether the file holds its bias.
        base_shape: The weight's shape ``[out, in]``, or ``[out, in, 1, 1]``.
        base_dtype: The weight's safetensors dtype.
        base_digest: The weight's digest (section 9.1).
        unknown: Fields that version 1.0 does not know.
    """

    rank: int
    mini_rank: int | None = None
    bias: bool | None = None
    base_shape: tuple[int, ...] | None = None
    base_dtype: str | None = None
    base_digest: str | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Module:
        """From a JSON object that keeps the rules."""
        known: dict[str, Any] = {name: value.get(name) for name in _MODULE_FIELDS}
        if known["base_shape"] is not None:
            known["base_shape"] = tuple(known["base_shape"])
        return cls(**known, unknown=_without(value, _MODULE_FIELDS))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**_present(self, _MODULE_FIELDS), **self.unknown}


@dataclass(frozen=True)
class Metadata:
    """All that a native adapter says about itself (section 5).

    Attributes:
        variant: The update's equation.
        modules: The adapted modules by name.
        axis: The axis of BAT's blocks.
        scale: A factor on every update.
        replaced: Replaced modules: the names of their tensors, relative to them.
        added: Those replaced modules that the base need not have.
        vocab_size: Rows of the replaced embeddings.
        fingerprint: The root over the modules' digests, ``blake3-1m:<hex>``.
        required_features: Features that a reader has to know.
        info: Information that changes nothing.
        version: The format's version.
        unknown: Fields that version 1.0 does not know.
    """

    variant: Variant
    modules: Mapping[str, Module]
    axis: Axis | None = None
    scale: float | None = None
    replaced: Mapping[str, tuple[str, ...]] | None = None
    added: tuple[str, ...] | None = None
    vocab_size: int | None = None
    fingerprint: str | None = None
    required_features: tuple[str, ...] | None = None
    info: Mapping[str, Any] | None = None
    version: str = FORMAT_VERSION
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Metadata:
        """From a JSON object that keeps the rules."""
        known = {name: value[name] for name in _FIELDS if name in value}
        known["variant"] = Variant(value["variant"])
        known["modules"] = {name: Module.of(entry) for name, entry in value["modules"].items()}
        if "axis" in known:
            known["axis"] = Axis(known["axis"])
        if "replaced" in known:
            known["replaced"] = {name: tuple(own) for name, own in known["replaced"].items()}
        for name in ("added", "required_features"):
            if name in known:
                known[name] = tuple(known[name])
        return cls(**known, unknown=_without(value, _FIELDS))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        modules = {name: module.to_json() for name, module in self.modules.items()}
        return {**_present(self, _FIELDS), "modules": modules, **self.unknown}

    def encode(self) -> str:
        """The canonical text; raises ConfigError for a number that it cannot hold."""
        return encode(self.to_json())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending."""
        return tuple(sorted({module.rank for module in self.modules.values()}))

    @property
    def replaced_names(self) -> tuple[str, ...]:
        """The full names of the replaced tensors, as they are listed."""
        replaced = self.replaced or {}
        return tuple(f"{module}.{leaf}" for module, own in replaced.items() for leaf in own)

    @property
    def added_names(self) -> frozenset[str]:
        """The full names of the replaced tensors that the base need not have."""
        replaced = self.replaced or {}
        return frozenset(f"{m}.{leaf}" for m in self.added or () for leaf in replaced[m])

    @property
    def biases(self) -> tuple[str, ...]:
        """The full names of the biases."""
        return tuple(f"{name}.bias" for name, module in self.modules.items() if module.bias)


_MODULE_FIELDS = ("rank", "mini_rank", "bias", "base_shape", "base_dtype", "base_digest")
_FIELDS = (
    "version",
    "variant",
    "modules",
    "axis",
    "scale",
    "replaced",
    "added",
    "vocab_size",
    "fingerprint",
    "required_features",
    "info",
)


def root_of(modules: Mapping[str, Module]) -> str:
    """The fingerprint of modules that all have dtype, shape and digest (section 9.2)."""
    rows = sorted(
        [f"{name}.weight", module.base_dtype, list(module.base_shape or ()), module.base_digest]
        for name, module in modules.items()
    )
    text = f"bone-adapter root 1\n{encode(rows)}"
    return f"{ALGORITHM}:{blake3.blake3(text.encode()).hexdigest()}"


def _present(value: object, names: tuple[str, ...]) -> dict[str, Any]:
    found = {name: getattr(value, name) for name in names}
    return {name: item for name, item in found.items() if item is not None}


def _without(value: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name not in names}
