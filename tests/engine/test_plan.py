"""What a run will write: in a folder of the output, names tell its tensors from all others."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from boneconv.engine.plan import Action, Plan, PlannedShard, PlannedTensor
from boneconv.io.safetensors import ArrayTensor
from tests.builders import grid


def _shard(name: str, *tensors: str) -> PlannedShard:
    planned = [
        PlannedTensor(each, "F32", Action.ADD, ArrayTensor(each, grid((2,)))) for each in tensors
    ]
    return PlannedShard.lay_out(name, planned, {})


def test_tensors_of_a_checkpoint_have_their_own_names() -> None:
    plan = Plan((_shard("a.safetensors", "x/y", "z"),), {}, {})
    assert list(plan.named) == ["x/y", "z"]
    assert tuple(plan.named.values()) == plan.tensors


def test_a_plan_in_a_folder() -> None:
    plan = Plan(
        (_shard("a.safetensors", "x/y"), _shard("b.safetensors", "z")),
        {PurePosixPath("c/d"): Path("somewhere")},
        {PurePosixPath("e"): b"text"},
        (PurePosixPath("f"),),
    )
    inside = plan.inside("unet")
    assert [shard.name for shard in inside.shards] == ["unet/a.safetensors", "unet/b.safetensors"]
    assert list(inside.named) == ["unet/x/y", "unet/z"]
    assert inside.tensors == plan.tensors
    assert [shard.head for shard in inside.shards] == [shard.head for shard in plan.shards]
    assert inside.copies == {PurePosixPath("unet/c/d"): Path("somewhere")}
    assert inside.texts == {PurePosixPath("unet/e"): b"text"}
    assert inside.left_out == (PurePosixPath("unet/f"),)
