"""The rules that hold for PEFT's own adapters too, under the numbers of the native format.

PEFT's layout has no metadata and no rules of its own, so that only these apply: the safetensors
file (R01 to R04), the configuration (R11, R24, R25), and blocks that fit it (R17 to R20, R23).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from boneconv.config import PEFT_TYPES, BoneConfig, Variant
from boneconv.dtypes import FLOATS, SIZES
from boneconv.errors import ConfigError, FormatError
from boneconv.formats.native.container import read_container
from boneconv.formats.native.rules import StageFailed, Violation, fail_on
from boneconv.formats.native.tensors import block_fits, value_faults
from boneconv.io.safetensors import StoredTensor
from boneconv.strict_json import read_object

__all__ = ["check_peft", "loads_in_peft"]

_SUFFIX = {"BONE": "bone_block", "MISS": "miss_block"}
_DTYPES = tuple(name for name, bits in SIZES.items() if bits % 8 == 0)
#: The fields that PEFT 0.14 knows. On any other it takes the adapter for Bone of rank 64.
_FIELDS_OF_0_14 = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "inference_mode",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "r",
        "revision",
        "target_modules",
        "task_type",
    }
)


def check_peft(config_path: Path, weights: Path) -> None:
    """Checks an adapter of PEFT's.

    Args:
        config_path: Its adapter_config.json.
        weights: Its weights; of a ``.bin`` file only the configuration is checked.

    Raises:
        StageFailed: All violations of the first stage that fails.
        MissingPathError, MachineError: A file is not there, or cannot be read.
    """
    config = _config(config_path)
    if weights.suffix != ".safetensors":
        return
    tensors = read_container(weights, _DTYPES).tensors
    fail_on([*_tensor_faults(config, tensors, weights), *value_faults(tensors, weights)])


def loads_in_peft(config_path: Path) -> str:
    """The versions of PEFT that read an adapter of PEFT's, by its configuration."""
    config = read_object(config_path)
    if config["peft_type"] == "MISS":
        return "0.17 and later"
    return "0.14 to 0.18" if config.keys() <= _FIELDS_OF_0_14 else "0.15 to 0.18"


def _config(path: Path) -> BoneConfig:
    try:
        values = read_object(path)
    except FormatError as error:
        raise StageFailed([Violation.of("R24", error.message, path, found=error.found)]) from error
    kind = values.get("peft_type")
    if kind not in PEFT_TYPES:
        violation = Violation.of(
            "R25",
            "the config of another method",
            path,
            expected=f"peft_type {' or '.join(PEFT_TYPES)}",
            found="no peft_type" if kind is None else f"peft_type {kind!r}",
        )
        raise StageFailed([violation])
    try:
        return BoneConfig.from_dict(values, path)
    except ConfigError as error:
        violation = Violation.of(
            "R11", error.message, path, expected=error.expected, found=error.found
        )
        raise StageFailed([violation]) from error


def _tensor_faults(
    config: BoneConfig, tensors: Mapping[str, StoredTensor], path: Path
) -> Iterator[Violation]:
    suffix = _SUFFIX[config.peft_type]
    others = set(_SUFFIX.values()) - {suffix}
    if not tensors:
        yield Violation.of("R17", "the adapter holds no tensors", path)
    for name, tensor in tensors.items():
        parts = name.split(".")[-2:]
        if others & set(parts):
            message = f"{name!r} does not belong to peft_type {config.peft_type}"
            expected = f"names that end in .{suffix}"
            yield Violation.of("R18", message, path, expected=expected)
        elif suffix in parts:
            yield from _block_faults(config, name, tensor, path)


def _block_faults(
    config: BoneConfig, name: str, tensor: StoredTensor, path: Path
) -> Iterator[Violation]:
    if tensor.dtype not in FLOATS:
        yield Violation.of(
            "R19",
            f"{name!r} has a dtype that blocks do not have",
            path,
            expected=", ".join(FLOATS),
            found=tensor.dtype,
        )
    mini = config.mini_r if config.variant is Variant.MINI else None
    fault = block_fits(config.axis, config.variant, config.r, mini, tensor.shape, None)
    if fault is not None:
        yield Violation.of(
            "R20",
            f"{name!r} is no {config.variant} block of rank {config.r}",
            path,
            expected=fault,
            found=list(tensor.shape),
            hint="Its config must name the variant and rank that it was trained with",
        )
