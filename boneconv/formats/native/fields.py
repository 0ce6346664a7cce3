"""Rules R05 to R16: the metadata of a native adapter, from text to `Metadata`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from boneconv.config import Axis, Variant
from boneconv.dtypes import FLOATS
from boneconv.formats.native.canonical import parse, spelled
from boneconv.formats.native.metadata import ALGORITHM, METADATA_KEY, Metadata, root_of
from boneconv.formats.native.rules import StageFailed, Violation, fail_on

__all__ = ["LARGEST_COUNT", "LONGEST_NAME", "name_fault", "parse_metadata"]

LARGEST_COUNT = 999_999_999
LONGEST_NAME = 512

_VERSION = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "base_layer")


def parse_metadata(texts: Mapping[str, str], path: Path) -> Metadata:
    """Reads and checks the metadata.

    Args:
        texts: The safetensors header's ``__metadata__``.
        path: The file, for messages.

    Raises:
        StageFailed: Violations of R05 to R16.
    """
    if METADATA_KEY not in texts:
        violation = Violation.of(
            "R05",
            "not an adapter in the Bone Adapter Format",
            path,
            expected=f"{METADATA_KEY!r} in the safetensors metadata",
            found=sorted(texts) or "no metadata",
            hint="BASE comes first, ADAPTER second",
        )
        raise StageFailed([violation])
    value = _parse(texts[METADATA_KEY], path)
    fail_on([*_version_faults(value, path), *_feature_faults(value, path)])
    fail_on(_field_faults(value, _TOP, ("variant", "modules"), "the metadata", path))
    fail_on(
        fault
        for name, module in value["modules"].items()
        for fault in _field_faults(module, _MODULE, ("rank",), f"module {name!r}", path)
    )
    metadata = Metadata.of(value)
    fail_on(
        [
            *_variant_faults(metadata, path),
            *_name_faults(metadata, path),
            *_collision_faults(metadata, path),
            *_fingerprint_faults(metadata, path),
        ]
    )
    return metadata


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        value = parse(text.encode())
    except ValueError as error:
        raise StageFailed([Violation.of("R06", f"the metadata: {error}", path)]) from error
    canonical = spelled(value)
    if canonical != text:
        at = next(
            (i for i, (a, b) in enumerate(zip(canonical, text, strict=False)) if a != b),
            min(len(canonical), len(text)),
        )
        violation = Violation.of(
            "R07",
            f"the metadata are not canonical at character {at}",
            path,
            expected=canonical[at : at + 40],
            found=text[at : at + 40],
        )
        raise StageFailed([violation])
    return value


def _version_faults(value: Mapping[str, Any], path: Path) -> Iterator[Violation]:
    version = value.get("version")
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None or match[1] != "1":
        yield Violation.of(
            "R08",
            "a version that cannot be read",
            path,
            expected="1.x",
            found="no version" if version is None else repr(version),
            hint=None if match is None else "A newer boneconv may read it",
        )


def _feature_faults(value: Mapping[str, Any], path: Path) -> Iterator[Violation]:
    features = value.get("required_features", [])
    if features != []:
        yield Violation.of(
            "R09",
            "it needs features that are not known",
            path,
            expected="no required_features",
            found=repr(features),
            hint="A newer boneconv may read it",
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_COUNT


def _is_shape(value: Any) -> bool:
    if not isinstance(value, list) or not all(map(_is_count, value)):
        return False
    return len(value) == 2 or (len(value) == 4 and value[2:] == [1, 1])


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


_Check = tuple[Callable[[Any], bool], str]

_TOP: dict[str, _Check] = {
    "variant": (lambda v: v in tuple(Variant), ", ".join(Variant)),
    "modules": (lambda v: isinstance(v, dict) and bool(v), "an object with a member or more"),
    "axis": (lambda v: v in tuple(Axis), " or ".join(Axis)),
    "scale": (lambda v: type(v) in (int, float), "a number"),
    "replaced": (
        lambda v: isinstance(v, dict) and bool(v) and all(map(_are_names, v.values())),
        "an object of non-empty lists of names",
    ),
    "added": (_are_names, "a non-empty list of names"),
    "vocab_size": (_is_count, f"an integer from 1 to {LARGEST_COUNT}"),
    "fingerprint": (_matches(rf"{ALGORITHM}:[0-9a-f]{{64}}"), f"{ALGORITHM}:<64 digits>"),
    "info": (lambda v: isinstance(v, dict), "an object"),
}
_MODULE: dict[str, _Check] = {
    "rank": (_is_count, f"an integer from 1 to {LARGEST_COUNT}"),
    "mini_rank": (_is_count, f"an integer from 1 to {LARGEST_COUNT}"),
    "bias": (lambda v: isinstance(v, bool), "true or false"),
    "base_shape": (_is_shape, "[out, in] or [out, in, 1, 1]"),
    "base_dtype": (lambda v: isinstance(v, str) and v in FLOATS, ", ".join(FLOATS)),
    "base_digest": (_matches(r"[0-9a-f]{64}"), "64 lower-case hexadecimal digits"),
}


def _field_faults(
    value: Any, checks: Mapping[str, _Check], required: tuple[str, ...], place: str, path: Path
) -> Iterator[Violation]:
    if not isinstance(value, dict):
        yield Violation.of("R11", f"{place} is no object", path, found=repr(value))
        return
    for name in required:
        if name not in value:
            yield Violation.of("R10", f"{place} has no {name}", path)
    for name, (holds, expected) in checks.items():
        if name in value and not holds(value[name]):
            message = f"{place} has a {name} that cannot be"
            yield Violation.of("R11", message, path, expected=expected, found=repr(value[name]))


def _variant_faults(metadata: Metadata, path: Path) -> Iterator[Violation]:
    if (metadata.axis is not None) != (metadata.variant is Variant.BAT):
        yield Violation.of(
            "R12",
            f"the axis of a {metadata.variant} adapter",
            path,
            expected="an axis" if metadata.variant is Variant.BAT else "none",
            found=metadata.axis or "none",
        )
    for name, module in metadata.modules.items():
        if (module.mini_rank is not None) != (metadata.variant is Variant.MINI):
            yield Violation.of(
                "R12",
                f"the mini_rank of {name!r}, a module of a {metadata.variant} adapter",
                path,
                expected="a mini_rank" if metadata.variant is Variant.MINI else "none",
                found=module.mini_rank or "none",
            )


def name_fault(name: str) -> str | None:
    """What is wrong with the name of a module or a tensor; None where nothing is (R13)."""
    if len(name) > LONGEST_NAME:
        return f"it has {len(name)} characters, more than {LONGEST_NAME}"
    if _CONTROL.search(name):
        return "it holds a control character"
    parts = name.split(".")
    if "" in parts:
        return "it has an empty part"
    wrappers = [part for part in parts if part in _WRAPPERS]
    return f"it holds {wrappers[0]}, which a wrapper put there" if wrappers else None


def _name_faults(metadata: Metadata, path: Path) -> Iterator[Violation]:
    for name in dict.fromkeys([*metadata.modules, *metadata.replaced_names]):
        fault = name_fault(name)
        if fault is not None:
            yield Violation.of("R13", f"the name {name!r} cannot be: {fault}", path)


def _collision_faults(metadata: Metadata, path: Path) -> Iterator[Violation]:
    taken = {
        f"{module}.{leaf}"
        for module in metadata.modules
        for leaf in ("weight", "bias", "bone_block")
    }
    for name, count in Counter(metadata.replaced_names).items():
        if count > 1:
            yield Violation.of("R14", f"{name!r} is announced {count} times", path)
        if name in taken:
            message = f"{name!r} is replaced and belongs to an adapted module"
            yield Violation.of("R14", message, path)
    for module in dict.fromkeys(metadata.added or ()):
        if module not in (metadata.replaced or {}):
            yield Violation.of("R14", f"{module!r} is added, but not replaced", path)


def _fingerprint_faults(metadata: Metadata, path: Path) -> Iterator[Violation]:
    incomplete = False
    for name, module in metadata.modules.items():
        values = (module.base_shape, module.base_dtype, module.base_digest)
        if metadata.fingerprint is None and module.base_digest is not None:
            message = f"module {name!r} has a base_digest and the adapter no fingerprint"
            yield Violation.of("R15", message, path)
        elif metadata.fingerprint is not None and None in values:
            incomplete = True
            yield Violation.of(
                "R15",
                f"module {name!r} is not covered by the fingerprint",
                path,
                expected="base_shape, base_dtype and base_digest",
            )
    if metadata.fingerprint is None or incomplete:
        return
    root = root_of(metadata.modules)
    if metadata.fingerprint != root:
        message = "the fingerprint is not the root over the digests"
        yield Violation.of("R16", message, path, expected=root, found=metadata.fingerprint)
