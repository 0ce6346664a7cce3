"""Adapter folders for PEFT: BONE (0.14 to 0.18), MISS (0.17 and later) and LoRA (any).

What PEFT's type cannot say is refused, since PEFT would apply it wrongly without a word.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from boneconv.adapter import Adapter
from boneconv.config import CONFIG_NAME, Axis, BoneConfig, Variant
from boneconv.dtypes import SIZES
from boneconv.errors import UsageError
from boneconv.formats.peft import SAFETENSORS_NAME
from boneconv.formats.writing import Description, TensorFile, describe
from boneconv.io.files import machine_errors
from boneconv.io.safetensors import Tensor

__all__ = [
    "aligned",
    "check_fits",
    "dropped",
    "lora_config",
    "lora_names",
    "saved_tensors",
    "write",
    "write_config",
    "write_side_files",
]

PREFIX = "base_model.model."

_SUFFIX = {"BONE": "bone_block", "MISS": "miss_block"}
_BIAS_ONLY = {"BONE": "bone_only", "MISS": "MiSS_only"}


def write(adapter: Adapter, folder: Path, peft_type: str) -> None:
    """Writes a folder that PEFT loads, and reads its tensors back.

    Fields of the configuration that boneconv does not know are kept as they stood. Those that the
    type does not have are left out: ``mini_r`` and ``miss_dropout`` (BONE), ``peft_version`` (PEFT
    0.14 drops a configuration with a field that it does not know).

    Args:
        adapter: What to write.
        folder: An existing folder.
        peft_type: ``BONE`` or ``MISS``.

    Raises:
        UsageError: PEFT would not apply the adapter rightly (`check_fits`).
        MachineError: The folder cannot be written, or reads back differently.
    """
    check_fits(adapter, peft_type)
    suffix = _SUFFIX[peft_type]
    tensors = {f"{PREFIX}{b.module}.{suffix}": b.tensor for b in adapter.blocks.values()}
    tensors |= saved_tensors(adapter)
    with TensorFile(folder / SAFETENSORS_NAME, aligned(describe(tensors))) as file:
        for name, tensor in tensors.items():
            file.copy(name, tensor)
    file.check()
    write_config(folder, _config(adapter, peft_type))
    write_side_files(adapter, folder)


def check_fits(adapter: Adapter, peft_type: str) -> None:
    """Raises UsageError where PEFT's BONE or MISS cannot hold what the adapter does."""
    blocks = adapter.blocks.values()
    ranks = sorted({block.rank for block in blocks})
    widths = {block.mini_rank for block in blocks}
    wrong, hint = None, "Convert it to native or peft-lora, or merge it with boneconv merge"
    if adapter.config.variant is Variant.MINI and peft_type == "BONE":
        wrong = "mini exists in MiSS alone"
        hint = "Convert it to peft-miss or peft-lora"
    elif any(b.variant is Variant.BAT and b.axis is Axis.IN for b in blocks):
        wrong = "PEFT applies BAT over the output axis, this adapter is over the input axis"
    elif len(ranks) > 1 or len(widths) > 1:
        wrong = f"PEFT has one rank for all modules of {peft_type}, this adapter has {ranks}"
    elif any(len(block.base_shape or ()) > 2 for block in blocks):
        wrong = f"PEFT's {peft_type} is for linear modules, this adapter has convolutions"
    elif adapter.scale != 1.0:
        wrong = f"{peft_type} has no strength, this adapter has {adapter.scale:g}"
    if wrong is not None:
        raise UsageError(wrong, path=adapter.path, hint=hint)


def dropped(adapter: Adapter, written: BoneConfig) -> list[str]:
    """What of an adapter's configuration a written one does not say, where it mattered."""
    config = adapter.config
    lost = []
    if config.miss_dropout != written.miss_dropout:
        lost.append(f"miss_dropout {config.miss_dropout:g} (it matters in training only)")
    return [f"left out: {each}" for each in lost]


def saved_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The replaced tensors under the names that PEFT loads them by.

    The weight and the bias of an adapted module lie a level deeper in PEFT's model.
    """
    named = {}
    for name, tensor in adapter.saved.items():
        module, _, leaf = name.rpartition(".")
        below = f"{module}.base_layer.{leaf}" if module in adapter.blocks else name
        named[PREFIX + below] = tensor
    return named


def lora_names(module: str) -> tuple[str, str]:
    """The names of a module's lora_A and lora_B."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def lora_config(adapter: Adapter, rank: int, alpha: float) -> dict[str, Any]:
    """The configuration of a LoRA of one rank for all modules, with the fields of PEFT 0.14."""
    biases = any(
        leaf == "bias" and module in adapter.blocks
        for module, _, leaf in (name.rpartition(".") for name in adapter.saved)
    )
    return {
        **_common(adapter),
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def aligned(tensors: list[Description]) -> list[Description]:
    """Descriptions in an order that keeps every tensor aligned: wider dtypes first."""
    return sorted(tensors, key=lambda tensor: (-SIZES[tensor[1]], tensor[0]))


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes adapter_config.json as PEFT does, its keys sorted."""
    path = folder / CONFIG_NAME
    with machine_errors(path):
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def write_side_files(adapter: Adapter, folder: Path) -> None:
    """Copies the tokenizer and the chat templates that came with an adapter."""
    for source in adapter.side_files:
        target = folder / source.relative_to(adapter.path)
        with machine_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _common(adapter: Adapter) -> dict[str, Any]:
    """The fields that all of PEFT's types have."""
    config = adapter.config
    return {
        "task_type": config.task_type,
        "auto_mapping": config.auto_mapping,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": config.inference_mode,
        **_targets(adapter),
        "modules_to_save": _plain(config.modules_to_save),
    }


def _targets(adapter: Adapter) -> dict[str, Any]:
    """Which modules PEFT adapts: as the configuration says, or each of them by its full name."""
    config = adapter.config
    if config.target_modules is None:
        fields = {"target_modules": sorted(adapter.blocks)}
        return fields | dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return {
        "target_modules": _plain(config.target_modules),
        "exclude_modules": _plain(config.exclude_modules),
        "layers_to_transform": _plain(config.layers_to_transform),
        "layers_pattern": _plain(config.layers_pattern),
    }


def _config(adapter: Adapter, peft_type: str) -> dict[str, Any]:
    config = adapter.config
    fields = {
        **_common(adapter),
        "peft_type": peft_type,
        "r": _rank(adapter),
        "init_weights": config.init_weights,
        "bias": _BIAS_ONLY[peft_type] if config.bias == "bone_only" else config.bias,
    }
    if peft_type == "MISS":
        fields |= {"mini_r": config.mini_r, "miss_dropout": config.miss_dropout}
    return {**config.unknown, **fields}


def _rank(adapter: Adapter) -> int:
    return next((block.rank for block in adapter.blocks.values()), adapter.config.r)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
