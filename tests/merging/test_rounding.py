"""How many merged weights are not the exact value rounded once, on layers of a real model.

The exact value is worked out here, by formulas of its own: in float64 with a bound on its error,
and in fractions where the bound does not settle the rounding.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import boneconv
from tests.builders import DTYPES, Array, pack, same_bits, unpack, unpack_folder
from tests.oracle import real
from tests.oracle.quiet import quiet_peft

Dtype = Literal["bfloat16", "float16"]

#: Two of the model's thirty layers, the first and the last, and the numbers they get here.
LAYERS = {0: 0, 29: 1}
VOCABULARY = 64
STORED = {"bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"]}
PREFIX = "base_model.model."

# --- the exact values --------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A 16-bit float: bits of its significand, exponent of its smallest normal number."""

    bits: int
    lowest: int


FORMATS = {DTYPES["BF16"]: Format(8, -126), DTYPES["F16"]: Format(11, -14)}


def round_doubles(values: Array, form: Format) -> Array:
    """To nearest even, as float64: scaling by a power of two is exact, and rint ties to even."""
    exponents = np.frexp(values)[1] - 1
    quantum = np.ldexp(1.0, np.maximum(exponents, form.lowest) - (form.bits - 1))
    return np.rint(values / quantum) * quantum


def round_exactly(value: Fraction, form: Format) -> float:
    """To nearest even, as Python rounds a fraction; only zero itself is +0 whatever its sign."""
    if not value:
        return 0.0
    exponent = int(np.frexp(float(value))[1]) - 1  # of a neighbour: may be one too high
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, form.lowest) - (form.bits - 1))
    return math.copysign(float(round(value / quantum) * quantum), value)


def bone_terms(weight: Array, block: Array, row: int, column: int) -> list[Fraction]:
    return [_fraction(weight[row, column]), _fraction(block[column % len(block), row])]


def bat_terms(weight: Array, block: Array, row: int, column: int) -> list[Fraction]:
    r = block.shape[-1]
    tile, factors = weight[row, column - column % r :][:r], block[row // r, :, column % r]
    products = [_fraction(w) * _fraction(b) for w, b in zip(tile, factors, strict=True)]
    return [_fraction(weight[row, column]), *products, _fraction(factors[row % r])]


def _fraction(number: np.generic) -> Fraction:
    return Fraction(float(number))


def approximate(weight: Array, block: Array) -> tuple[Array, Array]:
    """Merged values in float64, and how far they may be from the exact ones."""
    w, b = weight.astype(np.float64), block.astype(np.float64)
    if b.ndim == 2:
        delta = b[np.arange(w.shape[1]) % len(b)].T
        values, magnitudes, terms = w + delta, np.abs(w) + np.abs(delta), 2
    else:
        change, largest = _bat(w, b), _bat(np.abs(w), np.abs(b))
        values, magnitudes, terms = w + change, np.abs(w) + largest, b.shape[-1] + 2
    return values, 2 * terms * np.finfo(np.float64).eps * magnitudes


def _bat(w: Array, b: Array) -> Array:
    r, out = b.shape[-1], np.empty_like(w)
    for tile, matrix in enumerate(b):
        rows = slice(tile * r, (tile + 1) * r)
        out[rows] = (w[rows].reshape(-1, r) @ matrix).reshape(r, -1)
        out[rows] += np.tile(matrix, (1, w.shape[1] // r))
    return out


def correctly_rounded(weight: Array, block: Array) -> Array:
    """The exact merged values, each rounded once to the weight's dtype."""
    form = FORMATS[weight.dtype]
    values, bound = approximate(weight, block)
    low, high = round_doubles(values - bound, form), round_doubles(values + bound, form)
    terms = bone_terms if block.ndim == 2 else bat_terms
    for row, column in np.argwhere((low != high) | (low == 0)):
        exact = sum(terms(weight, block, row, column), Fraction(0))
        low[row, column] = round_exactly(exact, form)
    return low.astype(weight.dtype)


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


# --- the oracle of this file -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [DTYPES["BF16"], DTYPES["F16"]])
def test_both_roundings_go_to_nearest_even(dtype: np.dtype[np.generic]) -> None:
    """Every finite number and every midpoint of two: the even neighbour, from both sides."""
    form = FORMATS[dtype]
    bits = np.arange(0x8000, dtype=np.uint16)
    finite = bits[: int(np.array(np.inf, dtype).view(np.uint16))]
    numbers = finite.view(dtype).astype(np.float64)
    midpoints = (numbers[1:] + numbers[:-1]) / 2
    even = np.where(finite[:-1] % 2 == 0, numbers[:-1], numbers[1:])
    assert np.array_equal(round_doubles(numbers, form), numbers)
    for sign in (1, -1):
        assert np.array_equal(round_doubles(sign * midpoints, form), sign * even)
        above = round_doubles(sign * np.nextafter(midpoints, np.inf), form)
        assert np.array_equal(above, sign * numbers[1:])
    for i in range(0, len(midpoints), 199):
        middle, tiny = Fraction(midpoints[i]), Fraction(2) ** -1200
        assert round_exactly(middle, form) == even[i]
        assert round_exactly(-middle - tiny, form) == -numbers[i + 1]
        assert round_exactly(middle - tiny, form) == numbers[i]
    assert math.copysign(1, round_exactly(Fraction(-1, 2**200), form)) == -1
    assert math.copysign(1, round_exactly(Fraction(0), form)) == 1


def test_the_bound_holds_and_ties_are_settled() -> None:
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(8, 12)).astype(DTYPES["BF16"])
    bone = rng.normal(size=(5, 8)).astype(np.float32)
    bat = rng.normal(size=(2, 4, 4)).astype(np.float32)
    for block, terms in ((bone, bone_terms), (bat, bat_terms)):
        values, bound = approximate(weight, block)
        for row, column in np.ndindex(*weight.shape):
            exact = sum(terms(weight, block, row, column), Fraction(0))
            assert abs(exact - Fraction(values[row, column])) <= Fraction(bound[row, column])
    ties = np.full((4, 4), 2.0**-8, np.float32)
    ones = np.ones((4, 4), DTYPES["BF16"])
    assert same_bits(correctly_rounded(ones, ties), ones)
    more = correctly_rounded(ones, np.nextafter(ties, np.float32(1)))
    assert np.array_equal(more.astype(np.float32), np.full((4, 4), 1 + 2.0**-7))
