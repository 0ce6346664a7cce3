"""adapter_config.json beside a native adapter (specification, section 10): rules R24 to R27.

PEFT 0.14 to 0.18 read an adapter of type BONE, and of a native one only what this file says. They
refuse the type BONE_ADAPTER, and with it everything that they would apply wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from boneconv.config import Axis, Variant
from boneconv.errors import FormatError
from boneconv.formats.native.canonical import parse, spelled
from boneconv.formats.native.metadata import Metadata
from boneconv.formats.native.rules import StageFailed, Violation
from boneconv.formats.native.tensors import BLOCK, PREFIX

__all__ = [
    "FREE_FIELDS",
    "HEADS",
    "HEAD_TASKS",
    "MAX_CONFIG",
    "NATIVE_TYPE",
    "PEFT_TYPE",
    "config_faults",
    "misread_by_peft",
    "parse_config",
    "read_config",
    "written_config",
]

NATIVE_TYPE, PEFT_TYPE = "BONE_ADAPTER", "BONE"
#: The largest adapter_config.json that is read (section 15).
MAX_CONFIG = 16 * 1024 * 1024

_TASKS = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
#: Tasks whose heads PEFT saves in full, and the names by which it finds them.
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
HEADS = frozenset({"classifier", "score", "qa_outputs"})


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


#: Members that do not matter to the adapter: what they may hold, and what is written by default.
FREE_FIELDS: dict[str, tuple[Callable[[Any], bool], str, Any]] = {
    "auto_mapping": (lambda v: v is None or isinstance(v, dict), "an object or null", None),
    "base_model_name_or_path": (_is_text, "a string or null", None),
    "inference_mode": (lambda v: isinstance(v, bool), "true or false", True),
    "revision": (_is_text, "a string or null", None),
    "task_type": (lambda v: v is None or v in _TASKS, "a task type of PEFT or null", None),
}


def read_config(path: Path) -> dict[str, Any]:
    """Reads a config.

    Raises:
        StageFailed: Violations of R24 or R25.
    """
    size = path.stat().st_size
    if size > MAX_CONFIG:
        violation = Violation.of(
            "R24", "too large", path, expected=f"at most {MAX_CONFIG} bytes", found=size
        )
        raise StageFailed([violation])
    return parse_config(path.read_bytes(), path)


def parse_config(text: bytes, path: Path) -> dict[str, Any]:
    """Parses a config; raises as `read_config`."""
    try:
        config = parse(text)
    except ValueError as error:
        raise StageFailed([Violation.of("R24", f"not strict JSON: {error}", path)]) from error
    kind = config.get("peft_type")
    if kind not in (PEFT_TYPE, NATIVE_TYPE):
        violation = Violation.of(
            "R25",
            "the config of another method",
            path,
            expected=f"peft_type {PEFT_TYPE} or {NATIVE_TYPE}",
            found="no peft_type" if kind is None else f"peft_type {kind!r}",
        )
        raise StageFailed([violation])
    return config


def config_faults(
    metadata: Metadata, tensors: Iterable[str], config: Mapping[str, Any], path: Path
) -> Iterator[Violation]:
    """Violations of R26 and R27 by a config that was parsed.

    Args:
        metadata: What the adapter says.
        tensors: The names of its tensors in the file.
        config: The config.
        path: The config's file.
    """
    bound = _bound_fields(metadata) if config["peft_type"] == PEFT_TYPE else {}
    for name, (holds, expected, _) in FREE_FIELDS.items():
        if name in config and not holds(config[name]):
            found = repr(config[name])
            yield Violation.of("R26", f"{name} cannot be", path, expected=expected, found=found)
    for name, value in bound.items():
        if name not in config:
            message = f"{name} is missing, and PEFT would take its own default"
            yield Violation.of("R26", message, path, expected=spelled(value))
        elif spelled(config[name]) != spelled(value):
            yield Violation.of(
                "R26",
                f"{name} is not what the adapter's metadata say",
                path,
                expected=spelled(value),
                found=spelled(config[name]),
            )
    for name in sorted(set(config) - {"peft_type", *FREE_FIELDS, *bound}):
        message = f"{name!r} does not belong beside peft_type {config['peft_type']}"
        hint = "PEFT 0.14 would take the adapter for Bone of rank 64" if bound else None
        yield Violation.of("R26", message, path, hint=hint)
    if config["peft_type"] == PEFT_TYPE:
        task = config.get("task_type")
        for reason in misread_by_peft(metadata, tensors, task if isinstance(task, str) else None):
            message = f"PEFT 0.14 to 0.18 would apply this adapter wrongly: {reason}"
            yield Violation.of("R27", message, path, expected=f"peft_type {NATIVE_TYPE}")


def written_config(
    metadata: Metadata, tensors: Iterable[str], free: Mapping[str, Any]
) -> dict[str, Any]:
    """The config that belongs to an adapter.

    Args:
        metadata: What the adapter says.
        tensors: The names of its tensors in the file.
        free: Values of free fields; the others are absent values.

    Raises:
        FormatError: A free field that is none, or that has a value that cannot be.
    """
    config = {name: free.get(name, default) for name, (_, _, default) in FREE_FIELDS.items()}
    for name, value in free.items():
        if name not in FREE_FIELDS or not FREE_FIELDS[name][0](value):
            raise FormatError(f"{name!r} cannot stand in adapter_config.json", found=repr(value))
    if next(misread_by_peft(metadata, tensors, config["task_type"]), None) is not None:
        return {"peft_type": NATIVE_TYPE, **config}
    return {"peft_type": PEFT_TYPE, **_bound_fields(metadata), **config}


def misread_by_peft(metadata: Metadata, tensors: Iterable[str], task: str | None) -> Iterator[str]:
    """Why PEFT 0.14 to 0.18 would apply an adapter wrongly: conditions P1 to P9 that do not hold.

    Args:
        metadata: What the adapter says.
        tensors: The names of its tensors in the file.
        task: The config's task type.
    """
    if metadata.variant is Variant.MINI:
        yield "its variant is mini"
    if metadata.axis is Axis.IN:
        yield "its BAT blocks lie along the input axis"
    if len(metadata.ranks) > 1:
        yield f"its modules have the ranks {', '.join(map(str, metadata.ranks))}"
    if metadata.scale not in (None, 1):
        yield f"it has the scale {metadata.scale}"
    if metadata.biases:
        yield "it holds biases"
    if any(len(module.base_shape or ()) == 4 for module in metadata.modules.values()):
        yield "it adapts a convolution"
    if metadata.required_features:
        yield "it needs features of the format"
    yield from _misread_names(metadata, list(tensors), task)


def _misread_names(metadata: Metadata, tensors: list[str], task: str | None) -> Iterator[str]:
    tails = [name for name in tensors if "bone_" in name.removesuffix(BLOCK)]
    if tails:
        yield f"a name holds bone_: {tails[0]!r}"
    heads = set(metadata.replaced or ()) | (HEADS if task in HEAD_TASKS else set())
    saved = {PREFIX + name for name in metadata.replaced_names}
    for name in tensors:
        if sum(name.count(head) for head in heads) != (name in saved):
            yield f"it finds saved modules by parts of names, and mistakes {name!r}"
            break
    inside = [
        name
        for name in metadata.replaced_names
        if any(f".{module}." in f".{name}" for module in metadata.modules)
    ]
    if inside:
        yield f"it would adapt inside a replaced module: {inside[0]!r}"


def _bound_fields(metadata: Metadata) -> dict[str, Any]:
    """The members that PEFT needs, and their values (section 10.1)."""
    bone = metadata.variant is Variant.BONE
    return {
        "bias": "none",
        "exclude_modules": None,
        "init_weights": True if bone else str(metadata.variant),
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": sorted(metadata.replaced or ()) or None,
        "r": metadata.ranks[-1],
        "target_modules": sorted(metadata.modules),
    }
