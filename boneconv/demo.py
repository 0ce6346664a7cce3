"""A tiny model and two tiny adapters, merged and checked: what boneconv does, in one screen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boneconv.config import CONFIG_NAME, Variant
from boneconv.dtypes import BF16
from boneconv.engine.plan import Action
from boneconv.formats import read_adapter
from boneconv.formats.peft import SAFETENSORS_NAME
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.safetensors import write_tensors
from boneconv.kernels import Stage, exact
from boneconv.merging import merge
from boneconv.planning import plan_merge

__all__ = ["DemoRow", "demo"]

_RANK = 4
_HIDDEN, _INNER, _VOCABULARY = 12, 20, 32
_SHAPES = {
    "self_attn.q_proj": (_HIDDEN, _HIDDEN),
    "mlp.up_proj": (_INNER, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _INNER),
}


@dataclass(frozen=True)
class DemoRow:
    """What became of one weight.

    Attributes:
        variant: The adapter's variant.
        tensor: The weight's name.
        weight_shape: Its shape ``[out, in]``.
        block_shape: The shape of the adapter's block.
        before: Its first element in the base.
        after: Its first element in the merged model.
        changed: How many of its elements changed.
        elements: How many it has.
        wrong: How many differ from the exact result rounded once.
    """

    variant: str
    tensor: str
    weight_shape: tuple[int, ...]
    block_shape: tuple[int, ...]
    before: float
    after: float
    changed: int
    elements: int
    wrong: int


def demo(folder: Path) -> list[DemoRow]:
    """Makes ``base``, ``adapter-bone`` and ``adapter-bat`` in a folder, merges each, checks both.

    Args:
        folder: An existing folder; ``merged-bone`` and ``merged-bat`` are written into it too.

    Returns:
        A row for each merged weight.

    Raises:
        InputError: The folder holds an earlier demo.
    """
    base = folder / "base"
    _make_base(base)
    rows = []
    for variant in (Variant.BONE, Variant.BAT):
        adapter, out = folder / f"adapter-{variant}", folder / f"merged-{variant}"
        _make_adapter(adapter, variant)
        merge(base, adapter, out)
        rows += _check(base, adapter, out)
    return rows


def _make_base(folder: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, NDArray[Any]] = {
        "model.embed_tokens.weight": rng.normal(0, 0.5, (_VOCABULARY, _HIDDEN)).astype(BF16)
    }
    for name, shape in _SHAPES.items():
        tensors[f"model.layers.0.{name}.weight"] = rng.normal(0, 0.5, shape).astype(BF16)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def _make_adapter(folder: Path, variant: Variant) -> None:
    rng = np.random.default_rng(1)
    blocks: dict[str, NDArray[Any]] = {}
    for name, (out_features, _) in _SHAPES.items():
        bat = (out_features // _RANK, _RANK, _RANK)
        shape = bat if variant is Variant.BAT else (_RANK, out_features)
        key = f"base_model.model.model.layers.0.{name}.bone_block"
        blocks[key] = rng.normal(0, 0.05, shape).astype(np.float32)
    config = {
        "peft_type": "BONE",
        "r": _RANK,
        "target_modules": sorted(name.split(".")[-1] for name in _SHAPES),
        "init_weights": "bat" if variant is Variant.BAT else True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(folder / SAFETENSORS_NAME, blocks)


def _check(base: Path, adapter: Path, out: Path) -> list[DemoRow]:
    """Recomputes every merged weight in rational arithmetic, independently of the merge."""
    blocks = {f"{b.module}.weight": b for b in read_adapter(adapter).blocks.values()}
    before, after = open_checkpoint(base).tensors, open_checkpoint(out).tensors
    rows = []
    for planned in plan_merge(base, adapter).plan.by_action(Action.MERGE):
        block = blocks[planned.name]
        weight, merged = before[planned.name].read(), after[planned.name].read()
        stage = Stage(block.variant, block.tensor.read(), block.axis)
        expected = exact.merge(weight, [stage], merged.dtype)
        rows.append(
            DemoRow(
                variant=str(block.variant),
                tensor=planned.name,
                weight_shape=weight.shape,
                block_shape=block.tensor.shape,
                before=float(weight[0, 0]),
                after=float(merged[0, 0]),
                changed=int((weight != merged).sum()),
                elements=weight.size,
                wrong=int((expected.view(np.uint16) != merged.view(np.uint16)).sum()),
            )
        )
    return rows
