"""Adapters, and the bases that they were trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vector_sources.tensors import Tensor, noise


@dataclass
class Adapter:
    """What one adapter's folder holds."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    texts: dict[str, str] = field(default_factory=dict)
    strength: float = 1


def config_of(meta: dict[str, Any], peft: bool, **free: Any) -> dict[str, Any]:
    """adapter_config.json (section 10)."""
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "peft_type": "BONE" if peft else "BONE_ADAPTER",
        "revision": None,
        "task_type": None,
    }
    if peft:
        variant = meta["variant"]
        config |= {
            "bias": "none",
            "exclude_modules": None,
            "init_weights": True if variant == "bone" else variant,
            "layers_pattern": None,
            "layers_to_transform": None,
            "modules_to_save": sorted(meta.get("replaced", {})) or None,
            "r": max(entry["rank"] for entry in meta["modules"].values()),
            "target_modules": sorted(meta["modules"]),
        }
    return config | free


def made(
    label: str,
    variant: str,
    modules: dict[str, tuple[int, int, int]],
    dtypes: str = "F32 F32",
    *,
    axis: str | None = None,
    mini: int | None = None,
    peft: bool = True,
    shapes: bool = False,
) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter and its base; `modules` maps a name to rank, out and in."""
    block_dtype, base_dtype = dtypes.split()
    meta: dict[str, Any] = {"version": "1.0", "variant": variant, "modules": {}}
    meta |= {"axis": axis} if axis else {}
    tensors, base = {}, {}
    for module, (rank, out, inside) in modules.items():
        entry = {"rank": rank} | ({"mini_rank": mini} if mini else {})
        meta["modules"][module] = entry | ({"base_shape": [out, inside]} if shapes else {})
        shape = (rank, mini or out)
        if variant == "bat":
            shape = ((out if axis == "out" else inside) // rank, rank, rank)
        name = f"{label}/{module}"
        tensors[f"{module}.bone_block"] = noise(f"{name}/block", block_dtype, *shape, size=0.25)
        base[f"{module}.weight"] = noise(f"{name}/weight", base_dtype, out, inside)
    base["norm.weight"] = noise(f"{label}/norm", base_dtype, 8)
    return Adapter(meta, tensors, config_of(meta, peft)), base
