"""SmolLM2-135M with trained adapters: honest candidates pass with room, single faults do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from boneconv.behaviour import BehaviourReport, measure_behaviour
from boneconv.merging import merge
from boneconv.onnx import export_onnx
from tests.oracle import real
from tests.oracle.graphs import Kind, smollm2_graph

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NAME = "model.layers.14.mlp.down_proj.weight"
RANK = real.SMOLLM2_RANK


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(f"{real.QUESTION}\nThe capital of France is\n")
    return path


def show(title: str, found: BehaviourReport) -> None:
    for each in found.sets:
        print(  # noqa: T201
            f"{title}, {each.name}: RMS {each.rms_ratio:.3g}, max {each.max_ratio:.3g} times, "
            f"yardstick {each.yardstick.rms:.3g}, control {each.control.rms:.3g}"
        )


@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_a_merged_checkpoint(
    cache: Path, real_base: Path, prompts: Path, tmp_path: Path, variant: real.Variant
) -> None:
    adapter = real.trained(cache, variant)
    merge(real_base, adapter, tmp_path / "out")
    found = measure_behaviour(real_base, [adapter], tmp_path / "out", prompts=prompts)
    show(f"merged {variant}", found)
    assert found.passed
    assert (found.prompts, found.weights) == ("file", ("bfloat16",))
    assert max(each.rms_ratio for each in found.sets) < 1
    assert found.greedy is not None
    assert found.greedy.divergences == ()


@pytest.mark.parametrize("kind", ["exporter", "genai-fp32", "genai-fp16"])
def test_a_patched_graph(
    cache: Path, real_base: Path, prompts: Path, tmp_path: Path, kind: Kind
) -> None:
    adapter, graph = real.trained(cache, "bone"), smollm2_graph(cache, kind)
    export_onnx(real_base, adapter, tmp_path / "out", graph=graph)
    found = measure_behaviour(real_base, [adapter], tmp_path / "out", prompts=prompts)
    show(kind, found)
    assert found.passed
    assert max(each.rms_ratio for each in found.deciding) < 3
    assert max(each.max_ratio for each in found.deciding) < 5


def unpatched(merged: Tensor, base: Tensor) -> Tensor:
    return base


def zeroed_row(merged: Tensor, base: Tensor) -> Tensor:
    merged[:, 5::RANK] = base[:, 5::RANK]
    return merged


def low_precision(merged: Tensor, base: Tensor) -> Tensor:
    import torch

    return merged.to(torch.float8_e4m3fn).to(merged.dtype)


def tail_dropped(merged: Tensor, base: Tensor) -> Tensor:
    merged[:, -RANK // 2 :] = base[:, -RANK // 2 :]
    return merged


@pytest.mark.parametrize("spoil", [unpatched, zeroed_row, low_precision, tail_dropped])
def test_one_fault_in_one_of_210_weights(
    real_base: Path,
    trained_bone: Path,
    prompts: Path,
    tmp_path: Path,
    spoil: Callable[[Any, Any], Any],
) -> None:
    from safetensors.torch import load_file, save_file

    merge(real_base, trained_bone, tmp_path / "out")
    shard = next(p for p in (tmp_path / "out").glob("*.safetensors") if NAME in load_file(p))
    tensors = load_file(shard)
    base = next(
        t for p in real_base.glob("*.safetensors") if (t := load_file(p)).get(NAME) is not None
    )
    tensors[NAME] = spoil(tensors[NAME].clone(), base[NAME]).contiguous()
    save_file(tensors, shard, {"format": "pt"})
    found = measure_behaviour(real_base, [trained_bone], tmp_path / "out", prompts=prompts)
    show(spoil.__name__, found)
    assert not found.passed
