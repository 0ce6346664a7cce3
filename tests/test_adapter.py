"""Adapter: a configuration and its tensors, consistent in themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from boneconv.adapter import Adapter, Block
from boneconv.config import Axis, BoneConfig, Variant
from boneconv.errors import FormatError, ShapeError
from boneconv.io.safetensors import ArrayTensor, StoredTensor
from tests.builders import BF16, F16, F32, F64

HERE = Path("folder")
INIT: dict[Variant, bool | str] = {Variant.BONE: True, Variant.BAT: "bat", Variant.MINI: "mini"}


def _config(variant: Variant, r: int = 4, mini_r: int = 2) -> BoneConfig:
    peft_type = "MISS" if variant is Variant.MINI else "BONE"
    return BoneConfig(peft_type=peft_type, r=r, mini_r=mini_r, init_weights=INIT[variant])


def _block(
    shape: tuple[int, ...], variant: Variant, dtype: object = F32, axis: Axis = Axis.OUT
) -> Block:
    tensor = ArrayTensor("q", np.zeros(shape, dtype))  # type: ignore[call-overload]
    return Block("layer.q", variant, axis, tensor, rank=4, mini_rank=2)


def _adapter(
    variant: Variant,
    shape: tuple[int, ...],
    dtype: object = F32,
    saved: dict[str, ArrayTensor] | None = None,
) -> Adapter:
    block = _block(shape, variant, dtype)
    weights = HERE / "adapter_model.safetensors"
    return Adapter(HERE, weights, "peft", _config(variant), {block.module: block}, saved or {})


@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        (Variant.BONE, (4, 12)),
        (Variant.BONE, (4, 1)),
        (Variant.BONE, (4, 4)),
        (Variant.MINI, (4, 2)),
        (Variant.BAT, (3, 4, 4)),
        (Variant.BAT, (1, 4, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=str)
def test_a_block_of_its_variant_and_rank_is_accepted(
    variant: Variant, shape: tuple[int, ...], dtype: object
) -> None:
    adapter = _adapter(variant, shape, dtype)
    (block,) = adapter.blocks.values()
    assert block.rank == 4
    assert block.parameters == np.prod(shape)


@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        (Variant.BONE, (3, 12)),
        (Variant.BONE, (12, 4)),
        (Variant.BONE, (4,)),
        (Variant.BONE, ()),
        (Variant.BONE, (4, 0)),
        (Variant.BONE, (3, 4, 4)),
        (Variant.MINI, (4, 3)),
        (Variant.MINI, (2, 4)),
        (Variant.MINI, (4, 12)),
        (Variant.BAT, (4, 12)),
        (Variant.BAT, (3, 4, 5)),
        (Variant.BAT, (3, 5, 5)),
        (Variant.BAT, (0, 4, 4)),
        (Variant.BAT, (1, 3, 4, 4)),
    ],
)
def test_a_block_of_another_variant_or_rank_is_refused(
    variant: Variant, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeError) as caught:
        _adapter(variant, shape)
    text = str(caught.value)
    assert text.startswith("folder/adapter_model.safetensors: the block of 'layer.q' is no ")
    assert f"found {list(shape)}" in text
    assert "config must name" in text


def test_an_adapter_without_tensors_is_none() -> None:
    with pytest.raises(FormatError, match="holds no tensors"):
        Adapter(HERE, HERE / "x", "peft", _config(Variant.BONE), {}, {})


def test_saved_tensors_alone_make_an_adapter() -> None:
    saved = {"head.weight": ArrayTensor("head.weight", np.zeros((2, 2), F16))}
    adapter = Adapter(HERE, HERE / "x", "peft", _config(Variant.BONE), {}, saved)
    assert adapter.saved == saved


def test_tensors_of_integers_are_refused() -> None:
    weights = HERE / "w"
    stored = StoredTensor(weights, "q", "I8", (4, 12), 0, 48)
    block = Block("layer.q", Variant.BONE, Axis.OUT, stored, rank=4)
    with pytest.raises(FormatError, match=r"dtype that cannot be merged.*found I8"):
        Adapter(HERE, weights, "peft", _config(Variant.BONE), {"layer.q": block}, {})
    with pytest.raises(FormatError, match=r"'head\.weight' has a dtype.*found I8"):
        Adapter(HERE, weights, "peft", _config(Variant.BONE), {}, {"head.weight": stored})
