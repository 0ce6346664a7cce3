"""Merging, unmerging and unloading; weights that are tied."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from boneconv.config import Axis, BoneConfig
from boneconv.errors import ConfigError, NonFiniteError
from boneconv.nn.model.bone_model import BoneModel
from tests.nn.model.modules import Deep, batch, bone, make, stir
from tests.oracle import models

VARIANTS: dict[str, BoneConfig] = {
    "bone": BoneConfig(r=5, target_modules=["lin0", "lin1"]),
    "bat": BoneConfig(r=6, target_modules=["lin0", "lin1"], init_weights="bat"),
    "bat_in": BoneConfig(
        r=2, target_modules=["lin0", "lin1"], init_weights="bat", axis=Axis.IN
    ),
    "mini": BoneConfig(
        peft_type="MISS", r=4, mini_r=3, target_modules=["lin0", "lin1"], init_weights="mini"
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("variant", VARIANTS)


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[n], other[n]) for n in one)


def _two() -> BoneModel:
    model = BoneModel(make(), {"a": VARIANTS["bone"], "b": VARIANTS["bat"]}, "a")
    stir(model, "a", seed=1)
    stir(model, "b", seed=2)
    return model


@EACH
def test_merging_keeps_the_output_and_unmerging_the_weights(variant: str) -> None:
    model, x = bone(VARIANTS[variant]), batch()
    adapted, state = model(x), _state(model)
    model.merge_adapter()
    torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-5)
    with model.disable_adapters():
        assert torch.equal(model(x), make()(x))
    model.unmerge_adapter()
    assert torch.equal(model(x), adapted)
    assert _same(_state(model), state)


@EACH
def test_merging_again_and_again_loses_nothing(variant: str) -> None:
    model = bone(VARIANTS[variant])
    state = _state(model)
    for _ in range(5):
        model.merge_adapter()
        model.unmerge_adapter()
    assert _same(_state(model), state)


@EACH
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload_gives_the_plain_model(variant: str, safe_merge: bool) -> None:
    model, x = bone(VARIANTS[variant]), batch()
    adapted, base = model(x), model.model
    merged = model.merge_and_unload(progressbar=True, safe_merge=safe_merge)
    assert merged is base
    assert set(merged.state_dict()) == set(make().state_dict())
    assert type(merged.lin0) is torch.nn.Linear
    torch.testing.assert_close(merged(x), adapted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged(x), make()(x), atol=1e-3)
    assert model.peft_config == {}
    assert model.active_adapters == []
    assert torch.equal(model(x), merged(x))


@EACH
def test_unloading_gives_the_model_as_it_was(variant: str) -> None:
    base = make()
    base.lin1.requires_grad_(False)
    model = BoneModel(base, VARIANTS[variant])
    stir(model)
    model.merge_adapter()
    assert model.unload() is base
    assert _same(_state(base), _state(make()))
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    assert trained == {"lin0.weight", "lin0.bias", "norm.weight", "norm.bias"}


def test_the_chosen_adapters_are_merged_in_their_order() -> None:
    x = batch()
    for names in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        model = _two()
        model.set_adapter(names)
        expected = model(x)
        model.set_adapter("a")
        model.merge_adapter(names)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        merged = model.merge_and_unload(adapter_names=names)
        torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)


def test_one_adapter_after_the_other() -> None:
    model, x = _two(), batch()
    model.set_adapter(["a", "b"])
    expected = model(x)
    model.merge_adapter("a")
    model.merge_adapter(["a", "b"])
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-5)


def test_merging_what_is_merged_and_unmerging_what_is_not_are_warnings() -> None:
    model = bone()
    with pytest.warns(UserWarning, match="no adapter is merged"):
        model.unmerge_adapter()
    model.merge_adapter()
    state = _state(model)
    with pytest.warns(UserWarning, match="merged already: default"):
        model.merge_adapter()
    assert _same(_state(model), state)


# Not a number


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@EACH
def test_a_safe_merge_checks_all_layers_before_it_changes_one(variant: str, value: float) -> None:
    for merge in ("merge_adapter", "merge_and_unload"):
        model = bone(VARIANTS[variant])
        model.model.lin1.bone_block["default"].data.view(-1)[3] = value  # the last layer
        before, base = _state(model), model.model
        with pytest.raises(NonFiniteError, match=r"not finite: lin1;.*Nothing was changed") as got:
            getattr(model, merge)(safe_merge=True)
        assert isinstance(got.value, ValueError)
        after = _state(model)
        assert {n for n in before if not torch.equal(before[n], after[n])} <= {
            "model.lin1.bone_block.default"
        }
        assert model.model is base
        assert list(model.peft_config) == ["default"]


def test_a_safe_merge_with_an_odd_rank_does_not_touch_the_base() -> None:
    model = bone(BoneConfig(r=5, target_modules=["lin0"]))  # 12 is no multiple of 5
    model.model.lin0.bone_block["default"].data[:] = float("nan")
    with pytest.raises(NonFiniteError):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.model.lin0.weight, make().lin0.weight)


def test_a_broken_base_is_found_too() -> None:
    model = bone()
    model.model.lin0.base_layer.weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="not finite: lin0"):
        model.merge_and_unload(safe_merge=True)


def test_a_dtype_that_cannot_be_merged_changes_nothing() -> None:
    model = bone()
    weight = model.model.lin1.base_layer.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match="the weight of 'lin1' has a dtype that cannot be merged"):
        model.merge_adapter()
    assert torch.equal(model.model.lin0.weight, make().lin0.weight)


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EACH
def test_half_precision(variant: str, dtype: torch.dtype) -> None:
    x = batch(dtype=dtype)
    model = BoneModel(make().to(dtype), VARIANTS[variant])
    blocks = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in blocks} == {dtype}
    stir(model, scale=0.05)
    out = model(x)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in blocks)
    model.merge_adapter()
    torch.testing.assert_close(model(x), out, rtol=0.02, atol=0.05)
    model.unmerge_adapter()
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EACH
def test_blocks_of_float32_in_a_model_of_half_precision(variant: str, dtype: torch.dtype) -> None:
    model = BoneModel(make().to(dtype), VARIANTS[variant], dtype=torch.float32)
    blocks = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in blocks} == {torch.float32}
    out = model(batch(dtype=dtype))
    assert out.dtype == dtype
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in blocks)


def test_the_merged_bytes_are_those_of_the_command(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    import boneconv

    model = BoneModel(make().to(torch.bfloat16), VARIANTS["bat"])
    stir(model, scale=0.1)
    save_file(make().to(torch.bfloat16).state_dict(), tmp_path / "base.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    boneconv.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "o.safetensors")
    merged = model.merge_and_unload().state_dict()
    assert _same(dict(merged), load_file(tmp_path / "o.safetensors"))


# Tied weights


def _tied(targets: Any, **more: Any) -> BoneModel:
    torch.manual_seed(2)
    with pytest.warns(UserWarning, match=r"'(lm_head|model.embed_tokens)' is tied to"):
        model = BoneModel(
            models.llama_tied().eval(), BoneConfig(r=4, target_modules=targets, **more)
        )
    stir(model)
    return model


@pytest.mark.parametrize(
    ("targets", "more"),
    [
        (["lm_head", "q_proj"], {}),
        (["q_proj"], {"modules_to_save": ["lm_head"]}),
        (["q_proj"], {"modules_to_save": ["embed_tokens"]}),
    ],
)
def test_an_adapter_of_a_tied_layer_changes_that_layer_alone(
    tmp_path: Path, targets: list[str], more: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    model = _tied(targets, **more)
    inputs = models.token_inputs()
    adapted = model(**inputs).logits
    with pytest.warns(UserWarning, match="had one weight and now have two"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, adapted, rtol=1e-5, atol=1e-5)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, merged(**inputs).logits)


def test_unmerging_a_tied_layer_ties_it_again() -> None:
    model = _tied(["lm_head"])
    model.merge_adapter()
    embeddings = model.model.model.embed_tokens.weight
    assert model.model.lm_head.weight is not embeddings
    model.unmerge_adapter()
    assert model.model.lm_head.weight is embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = model.unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings


def test_other_layers_of_a_tied_model_are_no_reason_to_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = BoneModel(models.llama_tied(), BoneConfig(r=4, target_modules="all-linear"))
        merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_convolutions_are_merged() -> None:
    model = BoneModel(make(Deep), BoneConfig(r=3, target_modules=["mix"]))
    stir(model)
    block = model.model.mix.bone_block["default"].detach()
    before = make(Deep).mix.weight.detach()
    merged = model.merge_and_unload().mix.weight
    expected = before[..., 0, 0] + block[np.arange(8) % 3].T
    torch.testing.assert_close(merged[..., 0, 0].detach(), expected)
    assert merged.shape == (4, 8, 1, 1)
