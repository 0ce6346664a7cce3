"""The reference: rounding once, and weights formed as the formulas say."""

from __future__ import annotations

import pytest

from tests.conftest import TinyCase

pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float64_is_rounded_once_to_half_precision(dtype: str) -> None:
    import torch

    from boneconv.behaviour.reference import round_weights

    half = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(20_000, generator=generator).to(half)
    bits = low.view(torch.int16)
    high = torch.where(bits % 2 == 0, bits + 1, bits - 1).view(half)  # a neighbour
    middle = (low.double() + high.double()) / 2
    for exact, expected in (
        (middle + (low.double() - middle) * 2.0**-40, low),
        (middle + (high.double() - middle) * 2.0**-40, high),
        (middle, torch.where(bits % 2 == 0, low, high)),  # a tie: to even
        (low.double(), low),
    ):
        model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
        model.weight = torch.nn.Parameter(exact.clone().reshape(-1, 1))
        round_weights(model, {"weight": dtype})
        assert torch.equal(model.weight.flatten(), expected.double())


def test_other_weights_stay() -> None:
    import torch

    from boneconv.behaviour.reference import round_weights

    model = torch.nn.Linear(3, 3, dtype=torch.float64)
    before = model.bias.detach().clone()
    round_weights(model, {"weight": "bfloat16"})
    assert torch.equal(model.bias, before)
    assert torch.equal(model.weight, model.weight.to(torch.bfloat16).double())


@pytest.mark.parametrize(("name", "variant"), [("llama-tied", "bat"), ("vit", "bone")])
def test_formed_weights_answer_as_peft_does(tiny_case: TinyCase, name: str, variant: str) -> None:
    import torch

    from boneconv.behaviour.loading import classes_of, load_model
    from boneconv.behaviour.reference import attach, form
    from boneconv.formats import load_adapter
    from tests.oracle import tiny

    case = tiny_case(name, variant=variant)  # type: ignore[arg-type]
    adapter = load_adapter(case.adapter)
    loaded = load_model(case.base, classes_of(case.base, [adapter])[0], "float64")
    assert loaded is not None
    bone = attach(loaded.model, [adapter], 1.0)
    assert form(bone) > 0
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs().items()}
    found = tiny.logits(bone, inputs)
    assert found.dtype == torch.float64
    base = tiny.base_logits(case)
    assert (found - tiny.peft_logits(case).double()).abs().max() < 1e-5
    assert (found - base.double()).abs().max() > 1e-2
