"""How many merged weights are not the exact value rounded once, on layers of a real model.

The exact value is worked out by formulas of the tests' own (`tests.oracle.rounding`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import boneconv
from tests.builders import DTYPES, Array, pack, same_bits, unpack, unpack_folder
from tests.oracle import real
from tests.oracle.quiet import quiet_peft
from tests.oracle.rounding import correctly_rounded

Dtype = Literal["bfloat16", "float16"]

#: Two of the model's thirty layers, the first and the last, and the numbers they get here.
LAYERS = {0: 0, 29: 1}
VOCABULARY = 64
STORED = {"bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"]}
PREFIX = "base_model.model."


def wrong_share(found: dict[str, Array], expected: dict[str, Array]) -> float:
    """The share of weights that are not the expected ones, bit for bit."""
    wrong = sum(
        np.count_nonzero(found[name].view(np.uint16) != expected[name].view(np.uint16))
        for name in expected
    )
    return float(wrong) / sum(weight.size for weight in expected.values())


# --- real layers -------------------------------------------------------------------------------


def _keep(name: str) -> str | None:
    """The name a tensor has in the reduced model; None where it is left out."""
    head, found, rest = name.partition("layers.")
    layer, _, rest = rest.partition(".")
    if not found:
        return name
    return f"{head}layers.{LAYERS[int(layer)]}.{rest}" if int(layer) in LAYERS else None


def _reduced(tensors: dict[str, Array]) -> dict[str, Array]:
    return {kept: tensors[name] for name in tensors if (kept := _keep(name)) is not None}


def make_base(full: Path, folder: Path, dtype: Dtype) -> Path:
    """Some layers of SmolLM2 and a few rows of its embedding, in a dtype."""
    folder.mkdir()
    tensors = _reduced(unpack_folder(full))
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:VOCABULARY]
    tensors = {name: tensor.astype(STORED[dtype]) for name, tensor in tensors.items()}
    (folder / "model.safetensors").write_bytes(pack(tensors, {"format": "pt"}))
    config = json.loads((full / "config.json").read_text())
    config |= {"num_hidden_layers": len(LAYERS), "vocab_size": VOCABULARY, "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapter(full: Path, folder: Path, strength: int) -> Path:
    """The trained adapter's blocks of those layers, times a number."""
    folder.mkdir()
    shutil.copyfile(full / "adapter_config.json", folder / "adapter_config.json")
    blocks = _reduced(unpack(full / "adapter_model.safetensors"))
    tensors = {name: np.float32(strength) * block for name, block in blocks.items()}
    (folder / "adapter_model.safetensors").write_bytes(pack(tensors, {"format": "pt"}))
    return folder


def by_peft(base: Path, adapter: Path, out: Path, dtype: Dtype) -> dict[str, Array]:
    """The weights after PEFT's own merge on the CPU, in the base's dtype."""
    from peft import PeftModel

    model = real.load_smollm2(base, dtype)
    with quiet_peft():
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return unpack(out / "model.safetensors")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("variant", "strength", "least"), [("bone", 1, 0.0), ("bat", 1, 0.04), ("bat", 16, 0.2)]
)
def test_every_weight_is_correctly_rounded(
    cache: Path, tmp_path: Path, variant: real.Variant, strength: int, least: float, dtype: Dtype
) -> None:
    """PEFT rounds BAT twice: the more often wrong, the larger the update.

    The adapter was trained for a few steps; sixteen times as strong it is like one of a long
    training. `least` is the share of weights that PEFT is known to get wrong.
    """
    base = make_base(real.smollm2(cache), tmp_path / "base", dtype)
    adapter = make_adapter(real.trained(cache, variant), tmp_path / "adapter", strength)
    weights = unpack(base / "model.safetensors")
    blocks = unpack(adapter / "adapter_model.safetensors")
    expected = {}
    for key, block in blocks.items():
        name = key.removeprefix(PREFIX).replace(".bone_block", ".weight")
        expected[name] = correctly_rounded(weights[name], block)
    assert len(expected) == 7 * len(LAYERS)

    boneconv.merge(base, adapter, tmp_path / "out")
    merged = unpack(tmp_path / "out" / "model.safetensors")
    ours = wrong_share(merged, expected)
    pefts = wrong_share(by_peft(base, adapter, tmp_path / "peft", dtype), expected)
    count = sum(weight.size for weight in expected.values())
    print(  # noqa: T201
        f"{variant} x {strength} in {dtype}, {count} weights, not correctly rounded: "
        f"boneconv {ours:.2%}, PEFT {pefts:.2%}"
    )
    assert ours == 0
    assert pefts >= least
    for name in weights.keys() - expected.keys():
        assert same_bits(weights[name], merged[name])
