"""`BoneConfig`: what an adapter_config.json says, every field of it.

The fields, their order and their defaults are those of PEFT 0.14 to 0.18 (``BoneConfig``), followed
by the three that PEFT 0.18's ``MissConfig`` adds or renames and by the axis that only the native
format records. This module imports neither torch nor numpy.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from boneconv.errors import ConfigError, NotABoneAdapterError
from boneconv.io.files import replacing
from boneconv.strict_json import read_object

__all__ = ["CONFIG_NAME", "Axis", "BoneConfig", "Variant"]

CONFIG_NAME = "adapter_config.json"

#: peft_type values that hold Bone, BAT or mini blocks.
PEFT_TYPES = ("BONE", "MISS")

_BIAS = {"none": "none", "all": "all", "bone_only": "bone_only", "MiSS_only": "bone_only"}
#: Fields that PEFT's BoneConfig does not have: MISS alone, or never where they say nothing.
_MISS_FIELDS = ("mini_r", "miss_dropout")


class Variant(StrEnum):
    """How a block updates its weight (arXiv 2409.15371; "mini" from PEFT 0.18's MiSS)."""

    BONE = "bone"
    BAT = "bat"
    MINI = "mini"


class Axis(StrEnum):
    """Which axis of the weight a BAT adapter's blocks run along."""

    OUT = "out"
    IN = "in"


@dataclass(frozen=True)
class BoneConfig:
    """The configuration of a Bone, BAT or mini adapter (fields and defaults of PEFT 0.14 to 0.18).

    Lists and sets of names become tuples. A configuration does not change; `dataclasses.replace`
    makes another one.

    Attributes:
        task_type: PEFT's task, such as ``CAUSAL_LM``. ``SEQ_CLS`` makes ``"all-linear"`` leave out
            the classifier; otherwise it is written and read only.
        peft_type: ``BONE`` (PEFT 0.14 to 0.18) or ``MISS`` (0.17 and later), the layout of the file
            that an adapter is saved as.
        auto_mapping: The class of the base model, where PEFT had no task type.
        base_model_name_or_path: The base that the adapter was trained on.
        revision: The base's revision on the Hub.
        inference_mode: Whether the adapter is frozen in a `BoneModel`.
        r: The rank, 64 by default: the height of a Bone block, the edge of a BAT block. A BAT block
            needs it to divide the weight's rows and columns; a Bone block does not.
        target_modules: The adapted modules. A list names them exactly or by what follows a dot in
            their names; a string is a regular expression that matches whole names; ``"all-linear"``
            is all linear modules but the output layer; None is what
            `boneconv.nn.model.defaults.DEFAULT_TARGETS` has for the model's architecture.
        exclude_modules: Modules left out of those, a list or a regular expression as above.
        init_weights: The variant: true or false is Bone, ``"bat"`` BAT, ``"mini"`` mini (MISS
            only). Blocks begin at zero, so that the model begins unchanged, except with false:
            then they are random.
        layers_to_transform: Index of the one layer, or indices of the layers, that are adapted; all
            when absent. Not with a regular expression. A module that ``target_modules`` names
            exactly is adapted whatever its layer.
        layers_pattern: Name (or regular expression) of the list of layers that the indices count,
            such as ``layers``; any list when absent. Not with a regular expression.
        bias: Which biases are trained and saved with the adapter: ``none``, ``all``, or
            ``bone_only`` for those of the adapted modules (PEFT's MiSS writes ``MiSS_only``).
        modules_to_save: Modules trained in full, as a copy that is saved beside the blocks.
        mini_r: Width of a mini block; out_features is a multiple of it.
        miss_dropout: Probability with which MISS drops inputs of Bone and mini blocks while
            training, 0 to 1; it does not change a merge.
        axis: Axis of the weight that BAT's blocks run along. PEFT knows only ``out``.
        peft_version: The PEFT that wrote the file (0.18 and later say so).
        unknown: Fields of the file that are none of the above, as they stood.
    """

    task_type: str | None = None
    peft_type: str = "BONE"
    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 64
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    bias: str = "none"
    modules_to_save: tuple[str, ...] | None = None
    mini_r: int = 1
    miss_dropout: float = 0.0
    axis: Axis = Axis.OUT
    peft_version: str | None = None
    unknown: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        object.__setattr__(self, "modules_to_save", _as_tuple(self.modules_to_save))
        self._check()
        object.__setattr__(self, "axis", Axis(self.axis))
        object.__setattr__(self, "bias", _BIAS[self.bias])

    @property
    def variant(self) -> Variant:
        """The variant that ``init_weights`` names."""
        if isinstance(self.init_weights, bool):
            return Variant.BONE
        return Variant(self.init_weights)

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], path: str | os.PathLike[str] | None = None
    ) -> BoneConfig:
        """The configuration in a parsed adapter_config.json.

        Args:
            values: The JSON object. Fields that are unknown are kept in ``unknown``.
            path: The file it came from, for messages.

        Raises:
            NotABoneAdapterError: ``peft_type`` is absent or names another method.
            ConfigError: A field has a value that cannot be.
        """
        peft_type = values.get("peft_type")
        if peft_type not in PEFT_TYPES:
            raise NotABoneAdapterError(
                "not a Bone, BAT or MiSS adapter",
                path=path,
                expected=f"peft_type {' or '.join(PEFT_TYPES)}",
                found="no peft_type" if peft_type is None else f"peft_type {peft_type!r}",
                hint=_other_method(peft_type),
            )
        known = {f.name for f in fields(cls)} - {"unknown"}
        chosen = {key: value for key, value in values.items() if key in known}
        unknown = {key: value for key, value in values.items() if key not in known}
        try:
            return cls(**chosen, unknown=unknown)
        except ConfigError as error:
            raise error.restated(error.message, path) from error

    @classmethod
    def from_file(cls, path: Path) -> BoneConfig:
        """The configuration in an adapter_config.json; raises as `from_dict`, or FormatError."""
        return cls.from_dict(read_object(path), path)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as PEFT spells it, ready for JSON: `from_dict` gives it back.

        The fields stand in PEFT's order, tuples as lists. Left out are ``mini_r`` and
        ``miss_dropout`` of a BONE adapter at their defaults, an absent ``peft_version``, and the
        axis ``out``, the only one that PEFT knows. ``bone_only`` is ``MiSS_only`` in a MISS
        adapter.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unknown"}
        silent: dict[str, Any] = {"peft_version": None, "axis": Axis.OUT}
        if self.peft_type == "BONE":
            silent |= {f.name: f.default for f in fields(self) if f.name in _MISS_FIELDS}
        elif self.bias == "bone_only":
            values["bias"] = "MiSS_only"
        kept = {k: v for k, v in values.items() if k not in silent or v != silent[k]}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
        if "axis" in plain:
            plain["axis"] = str(self.axis)
        return plain | {k: v for k, v in self.unknown.items() if k not in plain}

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Writes adapter_config.json as PEFT does, its keys sorted; whole or not at all.

        Args:
            path: The file; one that exists is replaced.

        Raises:
            ConfigError: A field of ``auto_mapping`` or ``unknown`` holds what JSON does not.
            MissingPathError: The folder is not there.
            DiskFullError, MachineError: The file cannot be written.
        """
        try:
            text = json.dumps(
                self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the configuration is no JSON: {error}", path=path) from error
        with replacing(Path(path)) as draft:
            draft.write_bytes(f"{text}\n".encode())

    def _check(self) -> None:
        _expect_int("r", self.r)
        _expect_int("mini_r", self.mini_r)
        _expect_probability("miss_dropout", self.miss_dropout)
        init = self.init_weights
        if not isinstance(init, bool) and init not in (Variant.BAT, Variant.MINI):
            raise ConfigError(
                "init_weights names no variant",
                expected='true, false, "bat" or "mini"',
                found=repr(init),
            )
        if init == Variant.MINI and self.peft_type == "BONE":
            raise ConfigError(
                'init_weights "mini" exists for MiSS only', expected='peft_type "MISS"'
            )
        if self.axis not in tuple(Axis):
            raise ConfigError("axis names no axis", expected="out or in", found=repr(self.axis))
        if self.bias not in tuple(_BIAS):
            raise ConfigError(
                "bias has an unknown value",
                expected="none, all, bone_only or MiSS_only",
                found=repr(self.bias),
            )
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            _expect_names(name, getattr(self, name))
        self._check_layers()
        for name in ("task_type", "base_model_name_or_path", "revision", "peft_version"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} is no text", expected="a string", found=repr(value))
        if self.auto_mapping is not None and not isinstance(self.auto_mapping, dict):
            raise ConfigError("auto_mapping is no object", found=repr(self.auto_mapping))

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        numbers = layers if isinstance(layers, tuple) else () if layers is None else (layers,)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int):
                raise ConfigError(
                    "layers_to_transform holds no layer index",
                    expected="integers",
                    found=repr(number),
                )
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} cannot be used when target_modules is a regular expression",
                    hint="Give target_modules as a list of names",
                )


def _as_tuple(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, set | frozenset):
        return tuple(sorted(value))
    return value


def _expect_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(
            f"{name} must be a positive integer", expected="1 or more", found=repr(value)
        )


def _expect_probability(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name} is no probability", expected="0 to 1", found=repr(value))


def _expect_names(name: str, value: Any) -> None:
    if value is None or (isinstance(value, str) and name != "modules_to_save"):
        return
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{name} holds no names", expected="a list of names", found=repr(value))


def _other_method(peft_type: object) -> str | None:
    if peft_type is None:
        return "The file needs the fields that PEFT 0.14 to 0.18 write for Bone"
    known = isinstance(peft_type, str) and peft_type.isidentifier() and len(peft_type) <= 40
    return f"Merge {peft_type if known else 'such'} adapters with the library that made them"
