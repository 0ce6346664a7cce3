"""What the tests of `convert` read back from an adapter's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from boneconv.config import Variant
from boneconv.formats import read_adapter
from tests.builders import (
    module,
    same_bits,
)

NORM = f"{module(0, 'norm')}.weight"
TENSORS = "adapter_model.safetensors"
FOLDER = {"adapter_config.json", TENSORS, "boneconv.json"}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "boneconv.json").read_text())
    return found


def assert_same(one: Path, other: Path) -> None:
    """Two adapters that do the same, every tensor equal in bits."""
    a, b = read_adapter(one), read_adapter(other)
    assert a.blocks.keys() == b.blocks.keys()
    for name, block in a.blocks.items():
        again = b.blocks[name]
        assert same_bits(block.tensor.read(), again.tensor.read())
        assert (block.variant, block.rank, block.mini_rank) == (
            again.variant,
            again.rank,
            again.mini_rank,
        )
        assert block.variant is not Variant.BAT or block.axis is again.axis
    assert a.saved.keys() == b.saved.keys()
    assert all(same_bits(t.read(), b.saved[n].read()) for n, t in a.saved.items())
