"""Any native adapter in PEFT 0.18.1: it computes the adapted layer rightly, or it is refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
from hypothesis import given

from boneconv.config import Variant
from boneconv.formats.native import write_native
from boneconv.validation import validate
from tests.builders import F64, Array
from tests.formats.native_cases import Case, cases
from tests.oracle.quiet import quiet_peft


def model_for(case: Case) -> Any:
    """Linear layers for the adapted weights, and a layer for every replaced tensor."""
    import torch
    from torch import nn

    class Node(nn.Module):
        def forward(self, x: Any) -> Any:
            return x

        def prepare_inputs_for_generation(self, *_: Any) -> None:
            """PEFT's class for CAUSAL_LM asks for it."""

    root = Node()
    weights = {f"{name}.weight": weight for name, weight in case.weights.items()}
    saved = case.native.saved
    weights |= {n: np.zeros(t.shape, "<f4") for n, t in saved.items() if n.endswith(".weight")}
    for name, weight in sorted(weights.items()):
        *path, _ = name.split(".")
        place: nn.Module = root
        for part in path[:-1]:
            if part not in dict(place.named_children()):
                place.add_module(part, Node())
            place = dict(place.named_children())[part]
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=f"{name[:-7]}.bias" in saved)
        layer.weight = nn.Parameter(torch.from_numpy(weight.astype("<f4")))
        for inner, child in dict(place.named_children()).get(path[-1], Node()).named_children():
            layer.add_module(inner, child)
        place.add_module(path[-1], layer)
    return root


def update(weight: Array, block: Array, case: Case) -> Array:
    """U(W) of the specification's sections 7.2 and 7.3."""
    out, inside = weight.shape
    if case.native.metadata.variant is Variant.BONE:
        return block[np.arange(inside) % len(block)].T
    r = block.shape[-1]
    tiles = weight.reshape(out // r, r, inside // r, r).swapaxes(1, 2)
    return (tiles @ block[:, None] + block[:, None]).swapaxes(1, 2).reshape(out, inside)


@hypothesis.settings(max_examples=60)
@given(case=cases())
def test_peft_applies_an_adapter_rightly_or_refuses_it(case: Case) -> None:
    import torch
    from peft import PeftModel

    model = model_for(case)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        write_native(case.native, folder)
        loads = json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "BONE"
        found = validate(folder)
        assert found.valid
        assert (found.peft.versions is not None) is loads
        try:
            with quiet_peft():
                loaded = PeftModel.from_pretrained(model, str(folder)).base_model.model
        except KeyError as error:
            assert "BONE_ADAPTER" in str(error)
            assert not loads
            return
    assert loads
    for module, weight in case.weights.items():
        block = case.native.block(module).read().astype(F64)
        wide = weight.astype(F64)
        x = np.linspace(-1, 1, 2 * weight.shape[1], dtype="<f4").reshape(2, -1)
        with torch.no_grad():
            y = loaded.get_submodule(module)(torch.from_numpy(x)).numpy()
        expected = x @ (wide + update(wide, block, case)).T
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    state = loaded.state_dict()
    for saved, tensor in case.native.saved.items():
        module, _, leaf = saved.rpartition(".")
        trained = state[f"{module}.modules_to_save.default.{leaf}"].float().numpy()
        np.testing.assert_array_equal(trained, tensor.read().astype("<f4"))
