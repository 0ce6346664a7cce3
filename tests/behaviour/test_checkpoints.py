"""Merged checkpoints: honest ones pass, spoiled ones do not, and nothing proves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from boneconv import pretrained
from boneconv.behaviour import BehaviourReport, BehaviourStatus, measure_behaviour
from boneconv.errors import MissingExtraError, UsageError
from boneconv.merging import merge
from tests.conftest import TinyCase

if TYPE_CHECKING:
    from torch import Tensor

pytest.importorskip("transformers")

Tensors = dict[str, "Tensor"]
DOWN = "model.layers.1.mlp.down_proj.weight"
SQUARE = "model.layers.0.self_attn.q_proj.weight"


def measured(
    tiny_case: TinyCase,
    out: Path,
    name: str = "llama-untied",
    *,
    variant: Any = "bone",
    rank: int = 8,
    dtype: str = "keep",
    spoil: Callable[[Tensors, Tensors], None] | None = None,
    **options: Any,
) -> BehaviourReport:
    """Merges a tiny case into ``out``, spoils the merge, and compares it."""
    from safetensors.torch import load_file, save_file

    case = tiny_case(name, variant=variant, rank=rank)
    merge(case.base, case.adapter, out, dtype=dtype, workers=1)
    if spoil is not None:
        weights = out / "model.safetensors"
        tensors = load_file(weights)
        spoil(tensors, load_file(case.base / "model.safetensors"))
        save_file({k: t.contiguous() for k, t in tensors.items()}, weights, {"format": "pt"})
    return measure_behaviour(case.base, [case.adapter], out, **options)


@pytest.mark.parametrize(
    ("name", "variant", "dtype", "output"),
    [
        ("llama-tied", "bone", "keep", "logits"),
        ("qwen2", "bat", "bfloat16", "logits"),
        ("gpt-neox", "mini", "float16", "logits"),
        ("bert", "bat", "keep", "logits"),
        ("vit", "bone", "bfloat16", "logits"),
        ("t5", "bone", "float16", "logits"),
        ("mixtral", "bone", "keep", "logits"),
        ("llava", "bat", "keep", "logits"),
        ("llama-embedding-and-lm-head", "bat", "bfloat16", "logits"),
        ("llama-resized", "bone", "float16", "logits"),
        ("gpt-neox-lm-head", "bone", "bfloat16", "logits"),
    ],
)
def test_an_honest_merge_passes(
    tiny_case: TinyCase, tmp_path: Path, name: str, variant: str, dtype: str, output: str
) -> None:
    found = measured(tiny_case, tmp_path / "out", name, variant=variant, dtype=dtype)
    assert (found.status, found.output, found.reference) == ("pass", output, "float64")
    assert found.reasons == ()
    for each in found.sets:
        assert each.rms_ratio < 2
        assert each.max_ratio < 3
        assert each.control.rms > 1000 * each.yardstick.rms
    if found.greedy is not None:
        assert (found.greedy.prompts, found.greedy.tokens) == (2, 24)
        assert found.greedy.divergences == ()


def unpatched(tensors: Tensors, base: Tensors) -> None:
    tensors[DOWN] = base[DOWN].to(tensors[DOWN].dtype)


def zeroed_row(tensors: Tensors, base: Tensors) -> None:
    # One row of the block changes every eighth column.
    changed = tensors[DOWN]
    changed[:, 3::8] = base[DOWN][:, 3::8].to(changed.dtype)


def swapped_rows(tensors: Tensors, base: Tensors) -> None:
    tensors[SQUARE][[0, 1]] = tensors[SQUARE][[1, 0]]


def transposed(tensors: Tensors, base: Tensors) -> None:
    tensors[SQUARE] = tensors[SQUARE].T


def narrowed(tensors: Tensors, base: Tensors) -> None:
    import torch

    kept = tensors[DOWN].dtype
    coarse = torch.bfloat16 if kept == torch.float32 else torch.float8_e4m3fn
    tensors[DOWN] = tensors[DOWN].to(coarse).to(kept)


def twice(tensors: Tensors, base: Tensors) -> None:
    update = tensors[DOWN].double() - base[DOWN].double()
    tensors[DOWN] = (tensors[DOWN].double() + update).to(tensors[DOWN].dtype)


def not_a_number(tensors: Tensors, base: Tensors) -> None:
    tensors[DOWN][0, 0] = float("nan")


SPOILS = [unpatched, zeroed_row, swapped_rows, transposed, narrowed, twice, not_a_number]


@pytest.mark.parametrize(
    ("spoil", "dtype"),
    [
        *((spoil, "keep") for spoil in SPOILS),
        *((spoil, "bfloat16") for spoil in (unpatched, zeroed_row, narrowed)),
        (unpatched, "float16"),
    ],
)
def test_a_spoiled_merge_fails(
    tiny_case: TinyCase, tmp_path: Path, spoil: Callable[[Tensors, Tensors], None], dtype: str
) -> None:
    found = measured(tiny_case, tmp_path / "out", dtype=dtype, spoil=spoil)
    assert found.status is BehaviourStatus.FAIL
    assert not found.passed
    assert found.reasons


def test_a_ragged_tail_that_was_dropped_fails(tiny_case: TinyCase, tmp_path: Path) -> None:
    def drop(tensors: Tensors, base: Tensors) -> None:
        tensors[DOWN][:, 60:] = base[DOWN][:, 60:]  # 64 columns are five times 12 and a tail of 4

    honest = measured(tiny_case, tmp_path / "honest", rank=12)
    assert honest.passed
    assert not measured(tiny_case, tmp_path / "out", rank=12, spoil=drop).passed


def test_bat_over_the_wrong_axis_fails(tiny_case: TinyCase, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    case = tiny_case("llama-untied", variant="bat")
    block = load_file(case.adapter / "adapter_model.safetensors")[
        f"base_model.model.{SQUARE.removesuffix('.weight')}.bone_block"
    ]

    def wrong(tensors: Tensors, base: Tensors) -> None:
        weight, r = base[SQUARE].clone(), 8
        for b in range(weight.shape[1] // r):
            tile = base[SQUARE][:, b * r : b * r + r].reshape(-1, r, r)
            weight[:, b * r : b * r + r] += (tile @ block[b] + block[b]).reshape(-1, r)
        tensors[SQUARE] = weight

    found = measured(tiny_case, tmp_path / "out", variant="bat", spoil=wrong)
    assert found.status is BehaviourStatus.FAIL


def test_what_peft_rounds_twice_passes_where_that_is_accepted(
    tiny_case: TinyCase, tmp_path: Path
) -> None:
    import torch

    def by_an_ulp(tensors: Tensors, base: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if "_proj" in name:
                off = torch.rand(tensor.shape, generator=generator) < 0.27
                tensors[name] = (tensor.view(torch.int16) + off.to(torch.int16)).view(tensor.dtype)

    options: dict[str, Any] = {"variant": "bat", "dtype": "bfloat16", "spoil": by_an_ulp}
    assert not measured(tiny_case, tmp_path / "a", **options).passed
    assert measured(tiny_case, tmp_path / "b", **options, tolerance_rule="peft").passed


def test_an_adapter_that_does_nothing_proves_nothing(tiny_case: TinyCase, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    case = tiny_case("llama-untied")
    silent = tmp_path / "silent"
    shutil.copytree(case.adapter, silent)
    weights = silent / "adapter_model.safetensors"
    tensors = {name: tensor * 0 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    merge(case.base, silent, tmp_path / "out", workers=1)
    found = measure_behaviour(case.base, [silent], tmp_path / "out")
    assert found.status is BehaviourStatus.INCONCLUSIVE
    assert not found.passed
    assert "proves nothing" in found.reasons[0]
    assert all(each.passed for each in found.sets)


def test_strength_and_a_stack_of_adapters(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, other = tiny_case("qwen2"), tiny_case("qwen2", variant="bat")
    merge(case.base, case.adapter, tmp_path / "out", more=[other.adapter], scale=0.5, workers=1)
    both = [case.adapter, other.adapter]
    assert measure_behaviour(case.base, both, tmp_path / "out", scale=0.5).passed
    assert not measure_behaviour(case.base, both, tmp_path / "out").passed
    assert not measure_behaviour(case.base, both[::-1], tmp_path / "out", scale=0.5).passed


def test_a_candidate_that_lacks_a_weight_fails(tiny_case: TinyCase, tmp_path: Path) -> None:
    def drop(tensors: Tensors, base: Tensors) -> None:
        del tensors[DOWN]

    found = measured(tiny_case, tmp_path / "out", spoil=drop)
    assert found.status is BehaviourStatus.FAIL
    assert DOWN in found.reasons[0]
    assert found.sets == ()


def test_a_candidate_of_another_size_fails(tiny_case: TinyCase, tmp_path: Path) -> None:
    def widen(tensors: Tensors, base: Tensors) -> None:
        import torch

        tensors[DOWN] = torch.cat([tensors[DOWN], tensors[DOWN]])

    found = measured(tiny_case, tmp_path / "out", spoil=widen)
    assert found.status is BehaviourStatus.FAIL


@pytest.mark.slow
def test_a_reference_in_float32_where_float64_does_not_fit(
    tiny_case: TinyCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from boneconv.behaviour import run

    monkeypatch.setattr(run, "available_memory", lambda: 0)
    said: list[str] = []
    for dtype in ("keep", "bfloat16"):
        out = tmp_path / dtype
        found = measured(tiny_case, out, variant="bat", dtype=dtype, note=said.append)
        assert (found.status, found.reference) == ("pass", "float32")
        assert any("the reference is float32" in note for note in found.notes)
        shutil.rmtree(out)
        spoiled = measured(tiny_case, out, variant="bat", dtype=dtype, spoil=unpatched)
        assert not spoiled.passed
    assert said[0].startswith("comparing logits needs about ")


@pytest.mark.slow
def test_other_adapters_made_of_it(tiny_case: TinyCase, tmp_path: Path) -> None:
    from boneconv.conversion import convert

    case = tiny_case("llama-untied")
    convert(case.adapter, tmp_path / "miss", to="peft-miss")
    found = measure_behaviour(case.base, [case.adapter], tmp_path / "miss")
    assert (found.status, found.reference) == ("pass", "float64")
    convert(case.adapter, tmp_path / "lora", to="peft-lora", base=case.base)
    assert measure_behaviour(case.base, [case.adapter], tmp_path / "lora").passed
    config = tmp_path / "lora" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"lora_alpha": 2 * content["lora_alpha"]}))
    assert not measure_behaviour(case.base, [case.adapter], tmp_path / "lora").passed


def test_a_truncated_lora_is_measured_and_held_to_no_limit(
    tiny_case: TinyCase, tmp_path: Path
) -> None:
    from boneconv.conversion import convert

    case = tiny_case("llama-untied", variant="bat")
    convert(
        case.adapter, tmp_path / "lora", to="peft-lora", base=case.base, rank=4, allow_error=True
    )
    found = measure_behaviour(case.base, [case.adapter], tmp_path / "lora")
    assert found.status is BehaviourStatus.MEASURED
    assert (found.rms_limit, found.max_limit) == (None, None)
    assert found.sets[0].rms_ratio > 100


def test_what_the_user_can_get_wrong(tiny_case: TinyCase, tmp_path: Path) -> None:
    case, images = tiny_case("llama-untied"), tiny_case("vit")
    (tmp_path / "prompts.txt").write_text("hello\n")
    with pytest.raises(UsageError, match="prompts need a tokenizer"):
        measure_behaviour(case.base, [case.adapter], case.base, prompts=tmp_path / "prompts.txt")
    with pytest.raises(UsageError, match="takes no text"):
        measure_behaviour(
            images.base, [images.adapter], images.base, prompts=tmp_path / "prompts.txt"
        )
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(case.base / "model.safetensors", bare)
    with pytest.raises(UsageError, match=r"config\.json"):
        measure_behaviour(bare, [case.adapter], case.base)
    with pytest.raises(UsageError, match="cannot be compared"):
        measure_behaviour(case.base, [case.adapter], tmp_path)
    with pytest.raises(UsageError, match="kind of candidate"):
        measure_behaviour(case.base, [case.adapter], case.base, kind="peft")


def test_without_transformers(
    tiny_case: TinyCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    case = tiny_case("llama-untied")
    with pytest.raises(MissingExtraError, match="pip install 'boneconv"):
        measure_behaviour(case.base, [case.adapter], case.base)


def test_a_report_is_a_value(tiny_case: TinyCase, tmp_path: Path) -> None:
    found = measured(tiny_case, tmp_path / "out")
    assert replace(found) == found
    assert hash(found)
