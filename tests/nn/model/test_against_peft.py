"""Outputs and gradients equal PEFT 0.18.1's, on the models that people adapt.

Not compared: convolutions, which PEFT refuses, BAT over the input axis, which it does not have, and
a Bone beside a BAT adapter on one layer, where it crashes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from boneconv.config import BoneConfig
from boneconv.nn.model.bone_model import BoneModel
from tests.nn.model.pipelines import tiny_unet, unet_inputs
from tests.oracle import models

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


@dataclass(frozen=True)
class Case:
    build: Callable[[], Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    targets: list[str]
    rank: int


CASES = {
    "llama": Case(
        models.llama_untied, models.token_inputs, ["q_proj", "v_proj", "o_proj", "down_proj"], 8
    ),
    "bert": Case(models.bert_classifier, models.token_inputs, ["query", "value", "dense"], 16),
    "vit": Case(models.vit, models.image_inputs, ["q_proj", "v_proj", "fc1"], 4),
    "unet": Case(tiny_unet, unet_inputs, ATTENTION, 8),
}


def _theirs(model: Any, options: dict[str, Any]) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if options.get("init_weights") == "mini":
            from peft.tuners.miss import MissModel

            return MissModel(model, {"default": peft.MissConfig(**options)}, "default")
        return peft.BoneModel(model, {"default": peft.BoneConfig(**options)}, "default")


def _blocks(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The blocks by the names that they have in our state dict."""
    return {
        name.replace("miss_block", "bone_block"): parameter
        for name, parameter in model.named_parameters()
        if "bone_block" in name or "miss_block" in name
    }


def _output(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result[0]


def _gradients(model: torch.nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    blocks = _blocks(model)
    found = torch.autograd.grad((output * weights).sum(), list(blocks.values()))
    return dict(zip(blocks, found, strict=True))


@pytest.mark.parametrize("variant", ["bone", "bat", "mini"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_peft(name: str, variant: str) -> None:
    case = CASES[name]
    torch.manual_seed(11)
    base = case.build().eval()
    options: dict[str, Any] = {"r": case.rank, "target_modules": case.targets}
    if variant == "bone":
        options["r"] = 5  # divides nothing
    else:
        options["init_weights"] = variant
    ours_options = dict(options)
    if variant == "mini":
        options["mini_r"] = ours_options["mini_r"] = 8
        ours_options["peft_type"] = "MISS"
    theirs = _theirs(copy.deepcopy(base), options)
    ours = BoneModel(base, BoneConfig(**ours_options))
    for key, block in _blocks(theirs).items():
        block.data = torch.randn_like(block) * 0.05
        _blocks(ours)[key].data = block.data.clone()
    assert set(_blocks(ours)) == set(_blocks(theirs))

    inputs = case.inputs()
    mine, reference = _output(ours, inputs), _output(theirs, inputs)
    with torch.no_grad(), ours.disable_adapters():
        assert (_output(ours, inputs) - reference).abs().max() > 1e-3
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
    expected = _gradients(theirs, reference)
    for key, gradient in _gradients(ours, mine).items():
        size = expected[key].abs().max().item()
        assert size > 0, key
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-5 * max(1, size))


@pytest.mark.parametrize("init_weights", [True, "bat"])
def test_merged_weights_are_those_of_peft(init_weights: bool | str) -> None:
    torch.manual_seed(11)
    base = models.llama_untied().eval()
    options: dict[str, Any] = {
        "r": 8, "target_modules": ["q_proj", "down_proj"], "init_weights": init_weights
    }  # fmt: skip
    theirs = _theirs(copy.deepcopy(base), options)
    ours = BoneModel(base, BoneConfig(**options))
    for key, block in _blocks(theirs).items():
        block.data = torch.randn_like(block) * 0.05
        _blocks(ours)[key].data = block.data.clone()
    expected = theirs.merge_and_unload().state_dict()
    merged = ours.merge_and_unload().state_dict()
    assert set(merged) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_the_same_modules_are_adapted() -> None:
    for targets, more in [
        (None, {}),
        ("all-linear", {}),
        (r"model\.layers\.\d+\.self_attn\.[qk]_proj", {}),
        (["q_proj", "model.layers.0.mlp.up_proj"], {"layers_to_transform": [1]}),
        (["v_proj"], {"layers_to_transform": 0, "layers_pattern": "layers"}),
        (["q_proj", "v_proj"], {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
        ("all-linear", {"exclude_modules": r".*\.mlp\..*", "modules_to_save": ["o_proj"]}),
    ]:
        base = models.llama_untied()
        options: dict[str, Any] = {"r": 4, "target_modules": targets, **more}
        theirs = _theirs(copy.deepcopy(base), options)
        ours = BoneModel(base, BoneConfig(**options))
        assert set(_blocks(ours)) == set(_blocks(theirs)), options
        trained = {n for n, p in ours.named_parameters() if p.requires_grad}
        assert trained == {n for n, p in theirs.named_parameters() if p.requires_grad}, options
