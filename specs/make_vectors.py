"""Write the conformance vectors of the Bone Adapter Format 1.0, byte for byte the same every time.

    python specs/make_vectors.py [FOLDER]

Needs blake3 beside the standard library. The arithmetic is rational, element by element, straight
from the equations of section 7, and shares no code with `run_vectors.py`. Numbers come from
SHA-256 of their labels, so that no library's random generator is part of the vectors.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from blake3 import blake3

PREFIX = "base_model.model."
LEAF = 1 << 20
#: exponent bits and mantissa bits
FORMS = {"F64": (11, 52), "F32": (8, 23), "F16": (5, 10), "BF16": (8, 7)}
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
#: the order in which tensors lie in a file (section 4.5)
LAYOUT = ["I64", "F64", "F32", "I32", "BF16", "F16", "U8", "BOOL"]
ERRORS = {
    "FormatError": "R01 R02 R03 R04 R06 R07 R08 R09 R19 R24",
    "NotABoneAdapterError": "R05 R25",
    "ConfigError": "R10 R11 R12 R15 R16 R26 R27",
    "NameMatchError": "R13 R14 R17 R18 R28",
    "ShapeError": "R20 R21 R22 R29",
    "NonFiniteError": "R23 R31",
    "BaseMismatchError": "R30",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor as bit patterns, row by row."""

    dtype: str
    shape: tuple[int, ...]
    bits: tuple[int, ...]

    @property
    def data(self) -> bytes:
        """The little-endian bytes."""
        return b"".join(value.to_bytes(WIDTHS[self.dtype], "little") for value in self.bits)

    @property
    def numbers(self) -> list[Fraction]:
        """The exact values."""
        return [decode(value, self.dtype) for value in self.bits]


@dataclass
class Adapter:
    """What one adapter's folder holds."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    texts: dict[str, str] = field(default_factory=dict)
    strength: float = 1


@dataclass
class Case:
    """A vector: adapters, a base, and what the merge must give."""

    title: str
    sections: str
    adapters: list[Adapter]
    base: dict[str, Tensor]
    peft: str
    ties: dict[str, str] = field(default_factory=dict)
    dtype: str | None = None


# ---------------------------------------------------------------- numbers


def decode(bits: int, dtype: str) -> Fraction:
    """The exact value of a bit pattern; not for NaN and infinity."""
    exponent_bits, mantissa_bits = FORMS[dtype]
    bias = 2 ** (exponent_bits - 1) - 1
    mantissa = bits & (1 << mantissa_bits) - 1
    exponent = bits >> mantissa_bits & (1 << exponent_bits) - 1
    if exponent:
        mantissa += 1 << mantissa_bits
    value = mantissa * Fraction(2) ** (max(exponent, 1) - bias - mantissa_bits)
    return -value if bits >> mantissa_bits + exponent_bits else value


def encode(value: Fraction, dtype: str, *, negative: bool | None = None) -> int:
    """The bit pattern nearest to a value, ties to even; `negative` is the sign of a zero."""
    exponent_bits, mantissa_bits = FORMS[dtype]
    bias = 2 ** (exponent_bits - 1) - 1
    sign = (value < 0 if negative is None else negative) << mantissa_bits + exponent_bits
    size = abs(value)
    if not size:
        return sign
    exponent = 1 - bias
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    scaled = size / Fraction(2) ** (exponent - mantissa_bits)
    mantissa, rest = divmod(scaled.numerator, scaled.denominator)
    twice = 2 * rest - scaled.denominator
    mantissa += twice > 0 or (twice == 0 and mantissa % 2)
    if mantissa == 2 << mantissa_bits:
        mantissa, exponent = mantissa >> 1, exponent + 1
    if exponent > bias:
        raise OverflowError(f"{float(value)} does not fit {dtype}")
    if mantissa < 1 << mantissa_bits:
        return sign | mantissa
    return sign | exponent + bias << mantissa_bits | mantissa - (1 << mantissa_bits)


def tensor(dtype: str, shape: Iterable[int], numbers: Iterable[float | Fraction]) -> Tensor:
    """A tensor of numbers, each rounded to the dtype."""
    bits = []
    for number in numbers:
        negative = math.copysign(1, number) < 0 if isinstance(number, float) else None
        bits.append(encode(Fraction(number), dtype, negative=negative))
    return Tensor(dtype, tuple(shape), tuple(bits))


def noise(label: str, dtype: str, *shape: int, size: Fraction | float = 1) -> Tensor:
    """Numbers between -size and size that look random and never change."""
    count, words = math.prod(shape), []
    for index in range(-(-count // 4)):
        block = hashlib.sha256(f"{label}/{index}".encode()).digest()
        words += [int.from_bytes(block[i : i + 8], "little") for i in range(0, 32, 8)]
    scale = Fraction(size) / 2**63
    return tensor(dtype, shape, [(word - 2**63) * scale for word in words[:count]])


# ---------------------------------------------------------------- the merge, from the equations


def updated(meta: dict[str, Any], entry: dict[str, Any], w: list[list[Fraction]], block: Tensor):
    """U(W) of section 7, as rows."""
    rank, numbers = entry["rank"], block.numbers
    if meta["variant"] != "bat":
        width = block.shape[1]
        return [
            [numbers[(j % rank) * width + i % width] for j in range(len(row))]
            for i, row in enumerate(w)
        ]
    return [
        [_bat(meta["axis"], rank, numbers, w, i, j) for j in range(len(row))]
        for i, row in enumerate(w)
    ]


def _bat(axis: str, rank: int, b: list[Fraction], w: list[list[Fraction]], i: int, j: int):
    n = (i if axis == "out" else j) // rank
    p, q, first = i % rank, j % rank, j - j % rank
    total = b[(n * rank + p) * rank + q]
    for k in range(rank):
        total += w[i][first + k] * b[(n * rank + k) * rank + q]
    return total


def merged(case: Case) -> dict[str, Tensor]:
    """The canonical merge (section 8.3)."""
    start = case.base | {alias: case.base[name] for alias, name in case.ties.items()}
    state: dict[str, Tensor | list[list[Fraction]]] = dict(start)
    for adapter in case.adapters:
        scale = Fraction(adapter.meta.get("scale", 1)) * Fraction(adapter.strength)
        blocks = {f"{m}.bone_block" for m in adapter.meta["modules"]}
        for module, entry in adapter.meta["modules"].items():
            rows = _rows(state[f"{module}.weight"])
            block = adapter.tensors[f"{module}.bone_block"]
            change = updated(adapter.meta, entry, rows, block)
            state[f"{module}.weight"] = [
                [x + scale * u for x, u in zip(row, step, strict=True)]
                for row, step in zip(rows, change, strict=True)
            ]
        state |= {name: t for name, t in adapter.tensors.items() if name not in blocks}
    out = {name: _rounded(name, value, start, case.dtype) for name, value in state.items()}
    return {n: t for n, t in out.items() if n not in case.ties or t != out[case.ties[n]]}


def _rows(value: Tensor | list[list[Fraction]]) -> list[list[Fraction]]:
    if isinstance(value, list):
        return value
    numbers, width = value.numbers, value.shape[1]
    return [numbers[i : i + width] for i in range(0, len(numbers), width)]


def _rounded(name: str, value: Any, start: dict[str, Tensor], cast: str | None) -> Tensor:
    dtype = cast or start.get(name, value).dtype
    if isinstance(value, list):
        return tensor(dtype, start[name].shape, (x for row in value for x in row))
    if value.dtype == dtype or value.dtype not in FORMS:
        return value
    signs = [bits >> 8 * WIDTHS[value.dtype] - 1 for bits in value.bits]
    pairs = zip(value.numbers, signs, strict=True)
    bits = tuple(encode(x, dtype, negative=bool(sign)) for x, sign in pairs)
    return Tensor(dtype, value.shape, bits)


# ---------------------------------------------------------------- digests


def digest(dtype: str, shape: Iterable[int], data: bytes) -> str:
    """The digest of a tensor (section 9.1)."""
    leaves = [blake3(data[i : i + LEAF]).digest() for i in range(0, len(data), LEAF)]
    sizes = "[" + ",".join(str(size) for size in shape) + "]"
    head = f"bone-adapter tensor 1\n{dtype}\n{sizes}\n{len(leaves)}\n"
    return blake3(head.encode("ascii") + b"".join(leaves)).hexdigest()


def marked(meta: dict[str, Any], base: dict[str, Tensor]) -> dict[str, Any]:
    """Metadata with the fingerprint of a base (section 9)."""
    meta, rows = json.loads(json.dumps(meta)), []
    for module, entry in meta["modules"].items():
        w = base[f"{module}.weight"]
        entry |= {"base_dtype": w.dtype, "base_shape": list(w.shape)}
        entry["base_digest"] = digest(w.dtype, w.shape, w.data)
        row = [f"{module}.weight", w.dtype, list(w.shape), entry["base_digest"]]
        rows.append(row)
    rows.sort(key=lambda row: row[0].encode())
    root = blake3(b"bone-adapter root 1\n" + canonical(rows).encode()).hexdigest()
    return meta | {"fingerprint": f"blake3-1m:{root}"}


# ---------------------------------------------------------------- files


def canonical(value: Any) -> str:
    """Canonical JSON (section 4.3), for the numbers that occur here."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def packed(header: Any, data: bytes) -> bytes:
    """A safetensors file of a header (an object, or its text) and its data."""
    if not isinstance(header, str):
        header = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    raw = header.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


def laid_out(tensors: dict[str, Tensor], texts: dict[str, str]) -> tuple[dict[str, Any], bytes]:
    """The header and the data, in the recommended order (section 4.5)."""
    header: dict[str, Any] = {"__metadata__": texts} if texts else {}
    data = b""
    for name in sorted(tensors, key=lambda n: (LAYOUT.index(tensors[n].dtype), n.encode())):
        t = tensors[name]
        span = [len(data), len(data) + len(t.data)]
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": span}
        data += t.data
    return header, data


def file_of(adapter: Adapter) -> tuple[dict[str, Any], bytes]:
    """The header and data of an adapter's file."""
    tensors = {PREFIX + name: t for name, t in adapter.tensors.items()}
    return laid_out(tensors, {"bone_adapter": canonical(adapter.meta), **adapter.texts})


def config_of(meta: dict[str, Any], peft: bool, **free: Any) -> dict[str, Any]:
    """adapter_config.json (section 10)."""
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "peft_type": "BONE" if peft else "BONE_ADAPTER",
        "revision": None,
        "task_type": None,
    }
    if peft:
        variant = meta["variant"]
        config |= {
            "bias": "none",
            "exclude_modules": None,
            "init_weights": True if variant == "bone" else variant,
            "layers_pattern": None,
            "layers_to_transform": None,
            "modules_to_save": sorted(meta.get("replaced", {})) or None,
            "r": max(entry["rank"] for entry in meta["modules"].values()),
            "target_modules": sorted(meta["modules"]),
        }
    return config | free


def write(path: Path, data: bytes) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write(path, text.encode("ascii"))


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write an adapter's two files."""
    write(folder / "adapter_model.safetensors", packed(*file_of(adapter)))
    if adapter.config is not None:
        write_json(folder / "adapter_config.json", adapter.config)


def write_case(folder: Path, case: Case) -> None:
    """Write a valid vector."""
    listed = []
    for number, adapter in enumerate(case.adapters, 1):
        path = "adapter" if number == 1 else f"adapter{number}"
        write_adapter(folder / path, adapter)
        listed.append({"path": path, "strength": adapter.strength})
    write(folder / "base.safetensors", packed(*laid_out(case.base, {})))
    write(folder / "expected.safetensors", packed(*laid_out(merged(case), {})))
    about: dict[str, Any] = {"title": case.title, "sections": case.sections.split()}
    about |= {"adapters": listed, "base": "base.safetensors", "expected": "expected.safetensors"}
    about |= {"peft": case.peft}
    about |= {"ties": case.ties} if case.ties else {}
    about |= {"dtype": case.dtype} if case.dtype else {}
    write_json(folder / "case.json", about)


# ---------------------------------------------------------------- valid vectors


def made(
    label: str,
    variant: str,
    modules: dict[str, tuple[int, int, int]],
    dtypes: str = "F32 F32",
    *,
    axis: str | None = None,
    mini: int | None = None,
    peft: bool = True,
    shapes: bool = False,
) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter and its base; `modules` maps a name to rank, out and in."""
    block_dtype, base_dtype = dtypes.split()
    meta: dict[str, Any] = {"version": "1.0", "variant": variant, "modules": {}}
    meta |= {"axis": axis} if axis else {}
    tensors, base = {}, {}
    for module, (rank, out, inside) in modules.items():
        entry = {"rank": rank} | ({"mini_rank": mini} if mini else {})
        meta["modules"][module] = entry | ({"base_shape": [out, inside]} if shapes else {})
        shape = (rank, mini or out)
        if variant == "bat":
            shape = ((out if axis == "out" else inside) // rank, rank, rank)
        name = f"{label}/{module}"
        tensors[f"{module}.bone_block"] = noise(f"{name}/block", block_dtype, *shape, size=0.25)
        base[f"{module}.weight"] = noise(f"{name}/weight", base_dtype, out, inside)
    base["norm.weight"] = noise(f"{label}/norm", base_dtype, 8)
    return Adapter(meta, tensors, config_of(meta, peft)), base


def variants() -> dict[str, Case]:
    """The variants, dtypes, ranks and axes."""
    cases = {}

    def add(name: str, title: str, sections: str, *args: Any, **options: Any) -> None:
        adapter, base = made(name.replace("bat-in-square", "bat-out-square"), *args, **options)
        loads = adapter.config is not None and adapter.config["peft_type"] == "BONE"
        cases[name] = Case(title, sections, [adapter], base, "loads" if loads else "refuses")

    pair = {"layers.0.q": (4, 8, 12), "layers.0.v": (4, 6, 8)}
    square, native = {"layers.0.q": (4, 8, 8)}, {"peft": False}
    add("bone-f32", "Bone, float32 blocks and base", "7.2", "bone", pair)
    add("bone-bf16", "Bone, bfloat16 blocks and base", "7.2 8", "bone", pair, "BF16 BF16")
    add("bone-f16", "Bone, float16 blocks and base", "7.2 8", "bone", pair, "F16 F16")
    add("bone-f64-base", "Bone, float32 blocks, float64 base", "7.2 8", "bone", pair, "F32 F64")
    add("bone-f32-on-bf16", "Bone, float32 blocks, bfloat16 base", "8.3", "bone", pair, "F32 BF16")
    add("bone-f16-on-bf16", "Bone, float16 blocks, bfloat16 base", "8.3", "bone", pair, "F16 BF16")
    add("bone-bf16-on-f32", "Bone, bfloat16 blocks, float32 base", "8.3", "bone", pair, "BF16 F32")
    ragged = {"layers.0.q": (4, 8, 10), "layers.0.v": (4, 5, 7)}
    add("bone-ragged", "in-features that are no multiple of the rank", "7.2", "bone", ragged)
    add("bone-rank-one", "rank 1", "7.2", "bone", {"q": (1, 3, 5)})
    add("bone-rank-above-in", "a rank above the in-features", "7.2", "bone", {"q": (7, 6, 5)})
    ranks = {"layers.0.q": (4, 8, 8), "layers.1.q": (3, 8, 8)}
    add("bone-ranks", "a rank for each module", "5.4 10.3", "bone", ranks, **native)
    title = "BAT over the output axis, square"
    add("bat-out-square", title, "7.3", "bat", square, axis="out")
    title = "BAT over the input axis: the blocks and base of bat-out-square, another result"
    add("bat-in-square", title, "7.4 10.3", "bat", square, axis="in", **native)
    wide, tall = {"layers.0.up": (4, 8, 16)}, {"layers.0.down": (4, 16, 8)}
    add("bat-out-wide-bf16", "BAT, out", "7.3 8.3", "bat", wide, "BF16 BF16", axis="out")
    add("bat-out-tall-f16", "BAT, out", "7.3 8.3", "bat", tall, "F16 F16", axis="out")
    add("bat-in-wide-f16", "BAT, in", "7.4 8.3", "bat", wide, "F16 F16", axis="in", **native)
    add("bat-in-tall-bf16", "BAT, in", "7.4 8.3", "bat", tall, "BF16 BF16", axis="in", **native)
    add("bat-out-f64-base", "BAT, float64 base", "7.3 8.3", "bat", square, "F32 F64", axis="out")
    bat_ranks = {"layers.0.q": (4, 8, 8), "layers.1.q": (2, 8, 6)}
    title = "BAT, a rank for each module"
    add("bat-ranks", title, "5.4 7.3 10.3", "bat", bat_ranks, axis="out", **native)
    add("mini-f32", "mini", "7.5 10.3", "mini", pair, mini=2, **native)
    title = "mini, ragged, bfloat16"
    add("mini-ragged", title, "7.5", "mini", {"q": (4, 6, 10)}, "BF16 BF16", mini=3, **native)
    return cases


def modules() -> dict[str, Case]:
    """Convolutions, biases, replaced tensors, ties."""
    cases = {}
    for name, variant, axis in (("bone", "bone", None), ("bat", "bat", "out")):
        adapter, base = made(f"conv-{name}", variant, {"proj": (4, 8, 8)}, axis=axis, peft=False)
        adapter.meta["modules"]["proj"]["base_shape"] = [8, 8, 1, 1]
        base["proj.weight"] = replace(base["proj.weight"], shape=(8, 8, 1, 1))
        title = f"a 1x1 convolution counts as linear ({variant})"
        cases[f"conv-{name}"] = Case(title, "7.6 10.3", [adapter], base, "refuses")

    adapter, base = made("bias", "bone", {"q": (4, 6, 8), "k": (4, 6, 8)}, peft=False, shapes=True)
    adapter.meta["modules"]["q"]["bias"] = True
    adapter.tensors["q.bias"] = noise("bias/new", "F32", 6)
    base |= {f"{m}.bias": noise(f"bias/{m}", "F32", 6) for m in "qk"}
    cases["bias"] = Case("a trained bias", "7.7 10.3", [adapter], base, "refuses")

    def headed(label: str, heads: dict[str, list[str]], **options: Any):
        adapter, base = made(label, "bone", {"layers.0.q": (4, 6, 8)}, peft=False, **options)
        adapter.meta["replaced"] = heads
        for module, leaves in heads.items():
            for leaf in leaves:
                shape = (3,) if leaf.endswith("bias") else (3, 6)
                name = f"{module}.{leaf}"
                adapter.tensors[name] = noise(f"{label}/{name}/new", "F32", *shape)
                base[name] = noise(f"{label}/{name}", options.get("dtypes", "F32 F32")[-3:], *shape)
        adapter.config = config_of(adapter.meta, True)
        return adapter, base

    adapter, base = headed("replaced", {"classifier": ["bias", "weight"]})
    adapter.config = config_of(adapter.meta, True, task_type="SEQ_CLS")
    cases["replaced"] = Case("a replaced classifier", "7.7", [adapter], base, "loads")
    heads = {"classifier": ["dense.bias", "dense.weight", "out.weight"]}
    adapter, base = headed("replaced-nested", heads)
    cases["replaced-nested"] = Case("a replaced module of two", "7.7", [adapter], base, "loads")

    adapter, base = made("replaced-rounded", "bone", {"q": (4, 6, 8)}, "F32 BF16", peft=False)
    adapter.meta["replaced"] = {"head": ["count", "weight"]}
    values = [0.1, -0.0, 2.0**-134, -(2.0**-135), 1 + 2.0**-8, 1 + 3 * 2.0**-8]
    adapter.tensors["head.weight"] = tensor("F32", (2, 3), values)
    adapter.tensors["head.count"] = Tensor("I64", (1,), (7,))
    base |= {"head.weight": noise("h", "BF16", 2, 3), "head.count": Tensor("I64", (1,), (3,))}
    adapter.config = config_of(adapter.meta, True)
    title = "replaced tensors take the base's dtype, rounded once; integers are copied"
    cases["replaced-rounded"] = Case(title, "7.7 8.4", [adapter], base, "loads")

    adapter, base = headed("replaced-added", {"score": ["weight"]})
    del base["score.weight"]
    adapter.meta["added"] = ["score"]
    title = "a new head that the base does not have"
    cases["replaced-added"] = Case(title, "7.7", [adapter], base, "loads")
    return cases | tied()


def tied() -> dict[str, Case]:
    """Embeddings, heads, and the ties between them."""
    cases, ties = {}, {"lm_head.weight": "embed.weight"}

    def add(name: str, title: str, new: dict[str, Tensor], extra: dict[str, Any], tie: bool):
        adapter, base = made(name, "bone", {"layers.0.q": (4, 6, 6)}, "F32 BF16", peft=False)
        replaced = {key.rpartition(".")[0]: ["weight"] for key in new}
        adapter.meta |= ({"replaced": replaced} if new else {}) | extra
        adapter.tensors |= new
        base["embed.weight"] = noise(f"{name}/embed", "BF16", 5, 6)
        if not tie:
            base["lm_head.weight"] = noise(f"{name}/head", "BF16", 5, 6)
        adapter.config = config_of(adapter.meta, True)
        used = ties if tie else {}
        cases[name] = Case(title, "7.7 7.8", [adapter], base, "loads", used)

    grown, one = noise("grown", "F32", 7, 6), noise("one", "BF16", 5, 6)
    rows = {"vocab_size": 7}
    both = {"embed.weight": grown, "lm_head.weight": noise("grown/head", "F32", 7, 6)}
    add("resized", "a resized embedding and its untied head", both, rows, False)
    both = {"embed.weight": grown, "lm_head.weight": grown}
    add("resized-tied", "embedding and head replaced by equal tensors stay tied", both, rows, True)
    title = "a replaced head is untied from the embedding"
    add("tied-head", title, {"lm_head.weight": one}, {}, True)
    title = "a replaced embedding alone leaves the head as it was: untied"
    add("tied-embedding", title, {"embed.weight": one}, {}, True)
    add("tied-untouched", "a tie that the adapter does not touch stays", {}, {}, True)

    adapter, base = made("tied-block", "bone", {"lm_head": (4, 8, 6)}, "F32 F32")
    base["embed.weight"] = base.pop("lm_head.weight")
    title = "a block on a tied head: the head is untied, the embedding stays"
    cases["tied-block"] = Case(title, "7.8", [adapter], base, "loads", ties)
    return cases


def strengths() -> dict[str, Case]:
    """Strength, stacking, output dtypes."""
    cases = {}
    wide = {"layers.0.q": (4, 8, 8)}
    for name, variant, axis in (("bone", "bone", None), ("bat", "bat", "out")):
        adapter, base = made(f"scale-{name}", variant, wide, axis=axis, peft=False)
        adapter.meta["scale"] = 0.1
        title = f"scale 0.1, the binary64 number ({variant})"
        cases[f"scale-{name}"] = Case(title, "4.3 5.6 7.9", [adapter], base, "refuses")
        adapter, base = made(f"strength-{name}", variant, wide, "BF16 BF16", axis=axis)
        adapter.strength = -0.75
        title = f"the caller's strength -0.75 ({variant})"
        cases[f"strength-{name}"] = Case(title, "7.9", [adapter], base, "loads")
    adapter, base = made("scale-strength", "bone", {"q": (4, 6, 8)}, peft=False, shapes=True)
    adapter.meta |= {"scale": 0.3, "replaced": {"head": ["weight"]}}
    adapter.meta["modules"]["q"]["bias"] = True
    adapter.tensors |= {"q.bias": noise("sb", "F32", 6), "head.weight": noise("sh", "F32", 2, 6)}
    base |= {"q.bias": noise("bb", "F32", 6), "head.weight": noise("bh", "F32", 2, 6)}
    adapter.strength = 0.7
    title = "scale times strength, exactly; biases and replaced tensors are not scaled"
    cases["scale-strength"] = Case(title, "7.9", [adapter], base, "refuses")

    for name, order in (("bone-bat", (0, 1)), ("bat-bone", (1, 0))):
        bone, base = made("stack", "bone", wide, "BF16 BF16")
        bat, _ = made("stack2", "bat", wide, "BF16 BF16", axis="out")
        chosen = [(bone, bat)[index] for index in order]
        title = f"a stack of two: {name.replace('-', ', then ')}; rounded once, at the end"
        cases[f"stack-{name}"] = Case(title, "7.10 8.3", chosen, base, "loads")
    first, base = made("stack-replaced", "bone", {"q": (4, 6, 8)}, "F32 BF16", peft=False)
    first.meta["replaced"] = {"gate": ["weight"]}
    first.tensors["gate.weight"] = noise("stack-replaced/gate/new", "F32", 6, 8)
    first.config = config_of(first.meta, True)
    base["gate.weight"] = noise("stack-replaced/gate", "BF16", 6, 8)
    second, _ = made("stack-replaced2", "bone", {"gate": (2, 6, 8)}, "F32 BF16")
    second.strength = 0.5
    title = "the second adapts what the first replaced, before any rounding"
    cases["stack-replaced"] = Case(title, "7.10 8.3", [first, second], base, "loads")

    for name, dtypes, cast in (
        ("f32-to-bf16", "F32 F32", "BF16"),
        ("bf16-to-f32", "BF16 BF16", "F32"),
    ):
        adapter, base = made(name, "bat", wide, dtypes, axis="out")
        base["position"] = Tensor("I64", (3,), (0, 1, 2))
        title = "another output dtype: every floating tensor, rounded once"
        cases[f"output-{name}"] = Case(title, "8.4", [adapter], base, "loads", dtype=cast)
    return cases


def roundings() -> dict[str, Case]:
    """Where rounding goes wrong when it is not done once and exactly."""
    cases = {}
    big = 2.0**127 * (2 - 2.0**-7)
    pairs = {
        "BF16": [
            (1.0, 2.0**-8),
            (1 + 2.0**-7, 2.0**-8),
            (1.0, 2.0**-8 + 2.0**-30),
            (-1.0, -(2.0**-8)),
            (1.5, -1.5),
            (-0.0, 0.0),
            (-1.0, 1.0),
            (2.0**-133, 2.0**-134),
            (2.0**-133, -(2.0**-134)),
            (2.0**-133, 2.0**-134 + 2.0**-149),
            (-(2.0**-133), 2.0**-134 + 2.0**-149),
            (big, 2.0**118),
            (2.0**-126, -(2.0**-133)),
            (3.0, 2.0**-40),
        ],
        "F16": [
            (1.0, 2.0**-11),
            (1 + 2.0**-10, 2.0**-11),
            (1.0, 2.0**-11 + 2.0**-34),
            (0.5, -0.5),
            (65504.0, 15.9990234375),
            (2.0**-24, 2.0**-25),
            (2.0**-24, -(2.0**-25)),
            (-(2.0**-24), 2.0**-25 + 2.0**-48),
            (2.0**-14, -(2.0**-24)),
            (-0.0, -0.0),
        ],
    }
    for dtype, rows in pairs.items():
        weights, blocks = zip(*rows, strict=True)
        meta = {"version": "1.0", "variant": "bone", "modules": {"q": {"rank": 1}}}
        tensors = {"q.bone_block": tensor("F32", (1, len(rows)), blocks)}
        base = {"q.weight": tensor(dtype, (len(rows), 1), weights)}
        title = "ties to even, subnormals, exact zeros, the brink of overflow"
        adapter = Adapter(meta, tensors, config_of(meta, True))
        cases[f"rounding-{dtype.lower()}"] = Case(title, "8.1 8.3", [adapter], base, "loads")
    meta = {"version": "1.0", "variant": "bat", "axis": "out", "modules": {"q": {"rank": 2}}}
    for dtype, half in (("BF16", 2.0**-9), ("F32", 2.0**-25)):
        blocks = [half, 2.0**30, 2.0**-35, -(2.0**31), half, 2.0**30, 2.0**-60, -(2.0**31)]
        block = tensor("F32", (2, 2, 2), blocks)
        weights = [1.0, 1.0, 1.0, -1.0] * 2
        base = {"q.weight": tensor(dtype, (4, 2), weights)}
        title = "a sum that float32, and float64 with two roundings, put on the wrong side"
        adapter = Adapter(meta, {"q.bone_block": block}, config_of(meta, True))
        cases[f"rounding-bat-{dtype.lower()}"] = Case(title, "8.3", [adapter], base, "loads")
    return cases


def formats() -> dict[str, Case]:
    """Fingerprints, names, optional fields, versions, files that others wrote."""
    cases = {}
    for name, variant, dtypes in (("bone", "bone", "BF16 BF16"), ("bat", "bat", "F32 F16")):
        axis = "out" if variant == "bat" else None
        pair = {"layers.1.q": (4, 8, 8), "layers.0.q": (4, 8, 8)}
        adapter, base = made(f"fingerprint-{name}", variant, pair, dtypes, axis=axis)
        adapter.meta = marked(adapter.meta, base)
        title = "the fingerprint of the base"
        cases[f"fingerprint-{name}"] = Case(title, "9", [adapter], base, "loads")

    names = ['слой.0."q"', "層.k\\v", "a b.c-d_e", "z.\U0001f9b4", "z.\uffee", "m.a/b"]
    adapter, base = made("names", "bone", dict.fromkeys(names, (2, 3, 4)))
    adapter.meta = marked(adapter.meta, base)
    title = "names of any printable characters, escaped and sorted by code points"
    cases["names"] = Case(title, "4.3 6.1 9", [adapter], base, "loads")
    for name, module in (("module", "neck.bone_proj"), ("replaced", "layers.0.q")):
        adapter, base = made(f"prefix-{name}", "bone", {module: (2, 4, 4)}, peft=False)
        if name == "replaced":
            adapter.meta["replaced"] = {"backbone_norm": ["weight"]}
            adapter.tensors["backbone_norm.weight"] = noise("pr", "F32", 4)
            base["backbone_norm.weight"] = noise("pb", "F32", 4)
        title = "a name with bone_ inside, on which PEFT's key rewriting stumbles"
        cases[f"peft-prefix-{name}"] = Case(title, "10.3", [adapter], base, "refuses")
    adapter, base = made("substring", "bone", {"layers.0.score_proj": (2, 4, 4)}, peft=False)
    adapter.config = config_of(adapter.meta, False, task_type="SEQ_CLS")
    title = "a module whose name holds one that PEFT saves whole for the task"
    cases["peft-substring-task"] = Case(title, "10.3", [adapter], base, "refuses")
    adapter, base = made("inside", "bone", {"head.q": (2, 4, 4)}, peft=False)
    adapter.meta["replaced"] = {"head": ["norm.weight"]}
    adapter.tensors["head.norm.weight"] = noise("in", "F32", 4)
    base["head.norm.weight"] = noise("ib", "F32", 4)
    title = "an adapted module inside a replaced one"
    cases["peft-substring-replaced"] = Case(title, "10.3", [adapter], base, "refuses")

    adapter, base = made("file-alone", "bat", {"q": (2, 4, 4)}, axis="in")
    adapter.config = None
    cases["file-alone"] = Case("the file without a folder", "4.1", [adapter], base, "no config")
    adapter, base = made("optional", "bone", {"q": (2, 4, 6)}, shapes=True)
    adapter.meta |= {"scale": 1, "required_features": [], "x-maker": [0.5, -2, 1e-4, None, {}]}
    adapter.meta["modules"]["q"] |= {"bias": False, "x-maker": "ignored", "base_dtype": "F32"}
    adapter.meta["info"] = {"producer": "make_vectors", "training": {"bias": "none", "r": 2}}
    adapter.config = config_of(adapter.meta, True, base_model_name_or_path="owner/name")
    title = "optional fields, defaults written out, and unknown fields to be ignored"
    cases["optional-fields"] = Case(title, "5 12", [adapter], base, "loads")
    adapter, base = made("minor", "bone", {"q": (2, 4, 6)})
    adapter.meta |= {"version": "1.7", "hindsight": True}
    title = "a higher minor version that requires no feature"
    cases["higher-minor"] = Case(title, "12", [adapter], base, "loads")
    adapter, base = made("other-writer", "bone", {"q": (2, 4, 6), "k": (2, 4, 6)})
    adapter.texts = {"format": "pt"}
    title = "metadata of another writer beside ours"
    cases["other-metadata"] = Case(title, "4.4", [adapter], base, "loads")
    return cases


# ---------------------------------------------------------------- invalid vectors


@dataclass
class Bad:
    """An invalid vector: one rule, and the files that break it and no other."""

    rule: str
    title: str
    file: bytes
    config: bytes | None = None
    base: dict[str, Tensor] | None = None
    strength: float = 1


Edit = Callable[[dict[str, Any]], Any]


def broken(edit: Edit, *args: Any, **options: Any) -> bytes:
    """The file of a small adapter whose metadata was edited."""
    adapter, _ = made("bad", *(args or ("bone", {"q": (2, 4, 6)})), **options)
    edit(adapter.meta)
    return packed(*file_of(adapter))


def header_of(**changes: Any) -> tuple[dict[str, Any], bytes]:
    """The header and data of a small adapter, its block's entry changed."""
    adapter, _ = made("bad", "bone", {"q": (2, 4, 6)})
    header, data = file_of(adapter)
    header[f"{PREFIX}q.bone_block"] |= changes
    return header, data


def containers() -> dict[str, Bad]:
    """Rules R01 to R04: the safetensors file."""
    header, data = header_of()
    good = packed(header, data)
    text = json.dumps(header, separators=(",", ":"))
    block = f"{PREFIX}q.bone_block"
    twice = text[:-1] + f',"{block}":' + json.dumps(header[block]) + "}"
    deep = "[" * 5000 + "]" * 5000
    span = header[block]["data_offsets"]
    other = {"dtype": "F32", "shape": [2], "data_offsets": [span[1] - 8, span[1]]}
    files = {
        "empty-file": ("R01", "an empty file", b""),
        "short-file": ("R01", "a file of seven bytes", good[:7]),
        "header-bomb": ("R01", "a header length beyond the file", b"\xff" * 8 + good[8:]),
        "header-past-end": ("R01", "a truncated header", good[:64]),
        "header-not-json": ("R02", "a header that is not JSON", packed(text[:-1], data)),
        "header-array": ("R02", "a header that is an array", packed("[]", b"")),
        "header-space": ("R02", "a header that begins with a space", packed(" " + text, data)),
        "header-bom": ("R02", "a byte order mark", packed("\ufeff" + text, data)),
        "header-not-utf8": ("R02", "bytes that are not UTF-8", bad_utf8(good)),
        "header-surrogate": ("R02", "a lone surrogate", packed(text[:-1] + ',"\\ud800":0}', data)),
        "header-duplicate": ("R02", "a tensor named twice", packed(twice, data)),
        "header-nan": ("R02", "NaN, which is not JSON", packed(text[:-1] + ',"x":NaN}', data)),
        "header-deep": ("R02", "five thousand brackets", packed('{"x":' + deep + "}", b"")),
        "metadata-not-strings": (
            "R03",
            "metadata that is not text",
            packed({"__metadata__": {"bone_adapter": {}}}, b""),
        ),
        "entry-unknown-dtype": ("R03", "an unknown dtype", packed(*header_of(dtype="F13"))),
        "entry-extra-member": ("R03", "a fourth member", packed(*header_of(stride=[1]))),
        "entry-negative-size": ("R03", "a negative size", packed(*header_of(shape=[-2, -4]))),
        "entry-fraction": ("R03", "a size that is no integer", packed(*header_of(shape=[2.5, 4]))),
        "entry-huge-shape": (
            "R03",
            "sizes whose product overflows 64 bits",
            packed(*header_of(shape=[2**52, 2**52, 0x1000, 1])),
        ),
        "entry-wrong-span": (
            "R03",
            "bytes that do not fit the shape",
            packed(*header_of(shape=[2, 5])),
        ),
        "data-truncated": ("R04", "missing data", good[:-4]),
        "data-trailing": ("R04", "data that no tensor owns", good + bytes(8)),
        "data-overlap": (
            "R04",
            "overlapping tensors",
            packed(header | {PREFIX + "k.bone_block": other}, data),
        ),
        "data-hole": ("R04", "a hole before the data", packed(*shifted(header, data, 8))),
    }
    return {name: Bad(*rest) for name, rest in files.items()}


def bad_utf8(good: bytes) -> bytes:
    """A file whose header holds a byte that UTF-8 does not know."""
    return good.replace(b"q.bone_block", b"\xff.bone_block", 1)


def shifted(header: dict[str, Any], data: bytes, by: int) -> tuple[dict[str, Any], bytes]:
    """The data moved on, the offsets with it."""
    moved = json.loads(json.dumps(header))
    for name, entry in moved.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
    return moved, bytes(by) + data


def metadata() -> dict[str, Bad]:
    """Rules R05 to R16: the metadata."""
    header, data = header_of()
    text = header["__metadata__"]["bone_adapter"]

    def spelled(rule: str, title: str, text: str) -> Bad:
        return Bad(rule, title, packed(header | {"__metadata__": {"bone_adapter": text}}, data))

    def edited(rule: str, title: str, edit: Edit, *args: Any, **options: Any) -> Bad:
        return Bad(rule, title, broken(edit, *args, **options))

    def module(**changes: Any) -> Edit:
        return lambda meta: meta["modules"]["q"].update(changes)

    def top(**changes: Any) -> Edit:
        return lambda meta: meta.update(changes)

    no_metadata = {name: entry for name, entry in header.items() if name != "__metadata__"}
    bat, mini = ("bat", {"q": (2, 4, 6)}), ("mini", {"q": (2, 4, 6)})
    add = text[:-1]
    cases = {
        "no-metadata": Bad("R05", "no metadata at all", packed(no_metadata, data)),
        "other-format": Bad(
            "R05",
            "an adapter of another tool",
            packed(header | {"__metadata__": {"format": "pt"}}, data),
        ),
        "metadata-not-json": spelled("R06", "metadata that is not JSON", text[:-1]),
        "metadata-array": spelled("R06", "metadata that is an array", "[]"),
        "metadata-duplicate": spelled(
            "R06", "a field given twice", '{"axis":"in","axis":"in"' + "," + text[1:]
        ),
        "metadata-deep": spelled(
            "R06", "seventeen levels", add + ',"x":' + "[" * 16 + "]" * 16 + "}"
        ),
        "metadata-nan": spelled("R06", "NaN", add + ',"x":NaN}'),
        "metadata-large-integer": spelled(
            "R06", "an integer of 2^53", add + ',"x":9007199254740992}'
        ),
        "metadata-exponent": spelled("R06", "a number with an exponent", add + ',"x":1e-3}'),
        "metadata-surrogate": spelled("R06", "a lone surrogate", add + ',"x":"\\ud800"}'),
        "metadata-unsorted": spelled(
            "R07",
            "fields out of order",
            '{"version":"1.0",' + text[1:].replace(',"version":"1.0"', ""),
        ),
        "metadata-spaces": spelled("R07", "spaces between tokens", text.replace(":", ": ", 1)),
        "metadata-escapes": spelled(
            "R07", "an escape that is not needed", text.replace("bone", "b\\u006fne")
        ),
        "metadata-integral": spelled("R06", "an integer written 2.0", add + ',"x":2.0}'),
        "metadata-small-number": spelled("R07", "a fraction below 0.0001", add + ',"x":0.00001}'),
        "metadata-long-number": spelled("R07", "more digits than are needed", add + ',"x":0.10}'),
        "version-missing": edited("R08", "no version", lambda meta: meta.pop("version")),
        "version-number": edited("R08", "a version that is a number", top(version=1)),
        "version-malformed": edited("R08", "a malformed version", top(version="1.00")),
        "version-major": edited("R08", "a higher major version", top(version="2.0")),
        "feature-unknown": edited(
            "R09",
            "a feature that 1.0 does not know",
            top(version="1.1", required_features=["sparse"]),
        ),
        "feature-not-list": edited(
            "R09", "features that are not a list", top(required_features="none")
        ),
        "no-variant": edited("R10", "no variant", lambda meta: meta.pop("variant")),
        "no-modules": edited("R10", "no modules", lambda meta: meta.pop("modules")),
        "no-rank": edited(
            "R10", "a module without a rank", lambda meta: meta["modules"]["q"].pop("rank")
        ),
        "variant-unknown": edited("R11", "an unknown variant", top(variant="lora")),
        "variant-case": edited("R11", "a variant in capitals", top(variant="BONE")),
        "modules-empty": edited("R11", "no module in modules", top(modules={})),
        "modules-list": edited("R11", "modules as a list", top(modules=["q"])),
        "rank-zero": edited("R11", "rank 0", module(rank=0)),
        "rank-fraction": edited("R11", "a rank that is no integer", module(rank=2.5)),
        "rank-text": edited("R11", "a rank that is text", module(rank="2")),
        "rank-true": edited("R11", "a rank that is a boolean", module(rank=True)),
        "axis-unknown": edited("R11", "an unknown axis", top(axis="both"), *bat, axis="out"),
        "scale-text": edited("R11", "a scale that is text", top(scale="1")),
        "bias-text": edited("R11", "a bias that is text", module(bias="none")),
        "base-shape-one": edited("R11", "a base shape of one size", module(base_shape=[4])),
        "base-shape-kernel": edited(
            "R11", "a convolution that is not 1x1", module(base_shape=[4, 6, 3, 3])
        ),
        "base-dtype-integer": edited(
            "R11", "a base dtype that is no float", module(base_dtype="I8")
        ),
        "replaced-empty": edited(
            "R11", "a replaced module without tensors", top(replaced={"k": []})
        ),
        "replaced-true": edited("R11", "replaced modules as a list", top(replaced=["k"])),
        "vocab-zero": edited("R11", "no rows", top(vocab_size=0)),
        "fingerprint-algorithm": edited(
            "R11", "an unknown algorithm", top(fingerprint="md5:" + "0" * 32)
        ),
        "axis-missing": edited(
            "R12", "BAT without an axis", lambda meta: meta.pop("axis"), *bat, axis="out"
        ),
        "axis-on-bone": edited("R12", "Bone with an axis", top(axis="out")),
        "mini-rank-missing": edited(
            "R12",
            "mini without mini_rank",
            lambda meta: meta["modules"]["q"].pop("mini_rank"),
            *mini,
            mini=2,
        ),
        "mini-rank-on-bone": edited("R12", "Bone with mini_rank", module(mini_rank=4)),
    }
    return cases | relations()


def relations() -> dict[str, Bad]:
    """Rules R13 to R16: names, collisions, the fingerprint."""

    def named(title: str, module: str) -> Bad:
        adapter, _ = made("bad", "bone", {module: (2, 4, 6)})
        return Bad("R13", title, packed(*file_of(adapter)))

    def changed(rule: str, title: str, edit: Callable[[Adapter], Any], mark: bool = False) -> Bad:
        adapter, base = made("bad", "bone", {"q": (2, 4, 6), "k": (2, 4, 6)})
        adapter.meta = marked(adapter.meta, base) if mark else adapter.meta
        edit(adapter)
        return Bad(rule, title, packed(*file_of(adapter)))

    def saved(*leaves: str, module: str = "q") -> Callable[[Adapter], Any]:
        def edit(adapter: Adapter) -> None:
            adapter.meta["replaced"] = {module: list(leaves)}
            adapter.tensors |= {f"{module}.{leaf}": noise("s", "F32", 4) for leaf in leaves}

        return edit

    def biased(adapter: Adapter) -> None:
        adapter.meta["modules"]["q"] |= {"bias": True}
        adapter.tensors["q.bias"] = noise("s", "F32", 4)

    def crossed(adapter: Adapter) -> None:
        adapter.meta["replaced"] = {"a": ["b.weight"], "a.b": ["weight"]}
        adapter.tensors["a.b.weight"] = noise("s", "F32", 4)

    zeros = "blake3-1m:" + "0" * 64
    return {
        "bias-without-shape": changed("R21", "a bias without base_shape", biased),
        "name-empty-part": named("an empty part", "layers..q"),
        "name-leading-dot": named("a leading dot", ".q"),
        "name-control": named("a terminal escape in a name", "q\x1b[2J"),
        "name-newline": named("a newline in a name", "q\nk"),
        "name-delete": named("a C1 control in a name", "q\x9b"),
        "name-wrapper": named("a wrapper's prefix that was not removed", "_orig_mod.layers.0.q"),
        "name-base-layer": named("PEFT's base_layer that was not removed", "layers.0.q.base_layer"),
        "name-long": named("a name of 513 characters", "q" * 513),
        "replaced-adapted": changed("R14", "a weight both adapted and replaced", saved("weight")),
        "replaced-bias": changed(
            "R14", "an adapted module's bias as a replaced tensor", saved("bias")
        ),
        "replaced-twice": changed("R14", "a tensor listed by two replaced modules", crossed),
        "replaced-repeated": changed("R14", "a tensor listed twice", repeated),
        "added-unknown": changed(
            "R14", "an added module that is not replaced", lambda a: a.meta.update(added=["k"])
        ),
        "fingerprint-partial": changed(
            "R15",
            "a module without its digest",
            lambda a: a.meta["modules"]["k"].pop("base_digest"),
            True,
        ),
        "fingerprint-no-shape": changed(
            "R15",
            "a digest without a shape",
            lambda a: a.meta["modules"]["k"].pop("base_shape"),
            True,
        ),
        "fingerprint-no-root": changed(
            "R15", "digests without a fingerprint", lambda a: a.meta.pop("fingerprint"), True
        ),
        "fingerprint-root": changed(
            "R16",
            "a root that is not that of the digests",
            lambda a: a.meta.update(fingerprint=zeros),
            True,
        ),
    }


def repeated(adapter: Adapter) -> None:
    """A replaced tensor listed twice."""
    adapter.meta["replaced"] = {"norm": ["weight", "weight"]}
    adapter.tensors["norm.weight"] = noise("s", "F32", 4)


def tensors() -> dict[str, Bad]:
    """Rules R17 to R23: the tensors."""

    def changed(
        rule: str, title: str, edit: Callable[[Adapter], Any], *args: Any, **options: Any
    ) -> Bad:
        adapter, _ = made("bad", *(args or ("bone", {"q": (2, 4, 6), "k": (2, 4, 6)})), **options)
        edit(adapter)
        return Bad(rule, title, packed(*file_of(adapter)))

    def block(dtype: str, *shape: int) -> Callable[[Adapter], Any]:
        return lambda a: a.tensors.update({"q.bone_block": noise("b", dtype, *shape)})

    def special(name: str, dtype: str, bits: int) -> Callable[[Adapter], Any]:
        def edit(adapter: Adapter) -> None:
            old = adapter.tensors[name]
            adapter.tensors[name] = Tensor(dtype, old.shape, (bits, *[0] * (len(old.bits) - 1)))

        return edit

    def biased(*shape: int) -> Callable[[Adapter], Any]:
        def edit(adapter: Adapter) -> None:
            adapter.meta["modules"]["q"] |= {"bias": True, "base_shape": [4, 6]}
            adapter.tensors["q.bias"] = noise("s", "F32", *shape)

        return edit

    def resized(adapter: Adapter) -> None:
        adapter.meta |= {"vocab_size": 5, "replaced": {"embed": ["weight"]}}
        adapter.tensors["embed.weight"] = noise("s", "F32", 6, 4)

    def replaced_nan(adapter: Adapter) -> None:
        adapter.meta["replaced"] = {"norm": ["weight"]}
        adapter.tensors["norm.weight"] = Tensor("F64", (1,), (0x7FF8 << 48,))

    def unprefixed(adapter: Adapter) -> Any:
        return adapter.tensors.pop("k.bone_block")

    def shape(*sizes: int) -> Callable[[Adapter], Any]:
        return lambda a: a.meta["modules"]["q"].update(base_shape=list(sizes))

    bat, mini = ("bat", {"q": (2, 4, 6)}), ("mini", {"q": (2, 4, 6)})
    cases = {
        "block-missing": changed("R17", "a module without its block", unprefixed),
        "bias-missing": changed(
            "R17",
            "a bias that is announced and absent",
            lambda a: (biased(4)(a), a.tensors.pop("q.bias")),
        ),
        "replaced-missing": changed(
            "R17",
            "a replaced tensor that is absent",
            lambda a: a.meta.update(replaced={"n": ["weight"]}),
        ),
        "block-unannounced": changed(
            "R18", "a block of no module", lambda a: a.meta["modules"].pop("k")
        ),
        "tensor-unannounced": changed(
            "R18",
            "a tensor that nothing announces",
            lambda a: a.tensors.update({"v.bias": noise("s", "F32", 4)}),
        ),
        "tensor-lora": changed(
            "R18",
            "a LoRA tensor beside the blocks",
            lambda a: a.tensors.update({"q.lora_A.weight": noise("s", "F32", 2, 6)}),
        ),
        "block-float64": changed("R19", "a block in float64", block("F64", 2, 4)),
        "block-integer": changed(
            "R19",
            "a block of integers",
            lambda a: a.tensors.update({"q.bone_block": Tensor("I32", (2, 4), (0,) * 8)}),
        ),
        "block-rank": changed("R20", "a block of another rank than announced", block("F32", 3, 4)),
        "block-dimensions": changed(
            "R20", "a Bone block of three dimensions", block("F32", 1, 2, 4)
        ),
        "block-empty": changed("R20", "a block without columns", block("F32", 2, 0)),
        "block-out": changed("R20", "a block that does not fit base_shape", shape(5, 6)),
        "block-bat-square": changed(
            "R20", "BAT blocks that are not square", block("F32", 2, 2, 3), *bat, axis="out"
        ),
        "block-bat-flat": changed(
            "R20", "a BAT adapter with a Bone block", block("F32", 2, 4), *bat, axis="out"
        ),
        "block-bat-none": changed(
            "R20", "no BAT block at all", block("F32", 0, 2, 2), *bat, axis="out"
        ),
        "block-bat-axis": changed(
            "R20", "BAT blocks for the other axis of base_shape", shape(6, 4), *bat, axis="out"
        ),
        "block-bat-ragged": changed(
            "R20", "a rank that does not divide the in-features", shape(4, 5), *bat, axis="out"
        ),
        "block-mini-width": changed(
            "R20", "a mini block of another width than announced", block("F32", 2, 4), *mini, mini=2
        ),
        "block-mini-out": changed(
            "R20", "a mini_rank that does not divide the out-features", shape(5, 6), *mini, mini=2
        ),
        "bias-shape": changed("R21", "a bias of another length than out", biased(5)),
        "bias-dimensions": changed("R21", "a bias of two dimensions", biased(4, 1)),
        "vocab-rows": changed("R22", "a vocab_size that no replaced tensor has", resized),
        "block-nan": changed("R23", "NaN in a block", special("q.bone_block", "F32", 0x7FC00000)),
        "block-infinity-bf16": changed(
            "R23", "infinity in a bfloat16 block", special("q.bone_block", "BF16", 0x7F80)
        ),
        "block-infinity-f16": changed(
            "R23", "infinity in a float16 block", special("q.bone_block", "F16", 0xFC00)
        ),
        "replaced-nan": changed("R23", "NaN in a replaced tensor", replaced_nan),
    }
    header, data = header_of()
    end = len(data)
    header["q.weight"] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    cases["tensor-prefix"] = Bad(
        "R18", "a tensor without the prefix", packed(header, data + bytes(4))
    )
    return cases


def configs() -> dict[str, Bad]:
    """Rules R24 to R27: adapter_config.json."""
    pair = {"q": (2, 4, 6), "k": (2, 4, 6)}

    def spelled(rule: str, title: str, edit: Callable[[str], str]) -> Bad:
        adapter, _ = made("bad", "bone", pair)
        text = edit(json.dumps(adapter.config))
        return Bad(rule, title, packed(*file_of(adapter)), text.encode())

    def changed(rule: str, title: str, *without: str, **changes: Any) -> Bad:
        adapter, _ = made("bad", "bone", pair)
        config = {n: v for n, v in adapter.config.items() if n not in without} | changes
        return Bad(rule, title, packed(*file_of(adapter)), json.dumps(config).encode())

    def misread(title: str, *args: Any, edit: Edit | None = None, task: Any = None, **options: Any):
        adapter, _ = made("bad", *(args or ("bone", pair)), **options)
        if edit:
            edit(adapter)
        config = config_of(adapter.meta, True, task_type=task)
        return Bad("R27", title, packed(*file_of(adapter)), json.dumps(config).encode())

    def top(**changes: Any) -> Edit:
        return lambda adapter: adapter.meta.update(changes)

    def biased(adapter: Adapter) -> None:
        adapter.meta["modules"]["q"] |= {"bias": True, "base_shape": [4, 6]}
        adapter.tensors["q.bias"] = noise("s", "F32", 4)

    def conv(adapter: Adapter) -> None:
        adapter.meta["modules"]["q"]["base_shape"] = [4, 6, 1, 1]

    def saved(name: str) -> Edit:
        def edit(adapter: Adapter) -> None:
            module, _, leaf = name.rpartition(":")
            adapter.meta["replaced"] = {module: [leaf]}
            adapter.tensors[f"{module}.{leaf}"] = noise("s", "F32", 4)

        return edit

    says = "what the metadata does not say: "
    return {
        "config-not-json": spelled("R24", "a config that is not JSON", lambda text: text[:-1]),
        "config-array": spelled("R24", "a config that is an array", lambda text: f"[{text}]"),
        "config-duplicate": spelled(
            "R24", "peft_type given twice", lambda text: '{"peft_type":"LORA",' + text[1:]
        ),
        "config-lora": changed("R25", "another method", peft_type="LORA"),
        "config-no-type": changed("R25", "no peft_type", "peft_type"),
        "config-unknown-field": changed(
            "R26", "a field on which PEFT 0.14 falls back to rank 64", peft_version="0.18.1"
        ),
        "config-missing-field": changed("R26", "no rank, which PEFT takes for 64", "r"),
        "config-rank": changed("R26", says + "the rank", r=4),
        "config-rank-float": changed("R26", says + "the rank as a fraction", r=2.5),
        "config-init-weights": changed("R26", says + "BAT", init_weights="bat"),
        "config-targets": changed(
            "R26", says + "fewer modules, which PEFT drops silently", target_modules=["q"]
        ),
        "config-pattern": changed(
            "R26", says + "a pattern for the modules", target_modules=".*[qk]"
        ),
        "config-excluded": changed("R26", says + "an excluded module", exclude_modules=["q"]),
        "config-layers": changed("R26", says + "some layers only", layers_to_transform=[0]),
        "config-bias": changed("R26", says + "trained biases", bias="all"),
        "config-saved": changed("R26", says + "saved modules", modules_to_save=["head"]),
        "config-free-type": changed("R26", "a revision that is a number", revision=7),
        "config-native-rank": changed(
            "R26", "BONE_ADAPTER with PEFT's fields", peft_type="BONE_ADAPTER"
        ),
        "peft-axis-in": misread("BAT over the input axis", "bat", {"q": (2, 4, 4)}, axis="in"),
        "peft-mini": misread("mini", "mini", pair, mini=2),
        "peft-ranks": misread("a rank for each module", "bone", {"q": (2, 4, 6), "k": (3, 4, 6)}),
        "peft-scale": misread("a scale", edit=top(scale=0.5)),
        "peft-bias": misread("a bias", edit=biased),
        "peft-conv": misread("a convolution", edit=conv),
        "peft-prefix": misread("bone_ inside a name", "bone", {"neck.bone_q": (2, 4, 6)}),
        "peft-prefix-saved": misread(
            "bone_ inside a saved name", edit=saved("backbone_norm:weight")
        ),
        "peft-saved-inside": misread(
            "a saved name inside an adapted one", edit=saved("q:norm.weight")
        ),
        "peft-saved-letter": misread("a saved name inside every name", edit=saved("m:weight")),
        "peft-saved-suffix": misread(
            "an adapted name inside a saved module", edit=saved("neck:x.q.weight")
        ),
        "peft-task": misread(
            "a name that the task saves", "bone", {"score_q": (2, 4, 6)}, task="SEQ_CLS"
        ),
    }


def bases() -> dict[str, Bad]:
    """Rules R28 to R31: the base, and the merge."""

    def changed(
        rule: str,
        title: str,
        edit: Callable[..., Any],
        *args: Any,
        mark: bool = False,
        strength: float = 1,
        **options: Any,
    ) -> Bad:
        adapter, base = made(
            "bad", *(args or ("bone", {"q": (2, 4, 6), "k": (2, 4, 6)})), **options
        )
        adapter.meta = marked(adapter.meta, base) if mark else adapter.meta
        edit(adapter, base)
        return Bad(rule, title, packed(*file_of(adapter)), None, base, strength)

    def weight(dtype: str, *shape: int) -> Callable[..., Any]:
        return lambda adapter, base: base.update({"q.weight": noise("w", dtype, *shape)})

    def one(name: str, dtype: str, first: int) -> Callable[..., Any]:
        def edit(adapter: Adapter, base: dict[str, Tensor]) -> None:
            target = adapter.tensors if name.endswith("block") else base
            old = target[name]
            target[name] = Tensor(dtype, old.shape, (first, *[0] * (len(old.bits) - 1)))

        return edit

    def brink(adapter: Adapter, base: dict[str, Tensor]) -> None:
        one("q.weight", "F16", 0x7BFF)(adapter, base)
        adapter.tensors["q.bone_block"] = tensor("F32", (2, 4), [16.0] + [0.0] * 7)

    def renamed(adapter: Adapter, base: dict[str, Tensor]) -> None:
        base["model.q.weight"] = base.pop("q.weight")

    def saved(new: Tensor, old: Tensor | None) -> Callable[..., Any]:
        def edit(adapter: Adapter, base: dict[str, Tensor]) -> None:
            adapter.meta["replaced"] = {"head": ["weight"]}
            adapter.tensors["head.weight"] = new
            if old:
                base["head.weight"] = old

        return edit

    def biased(adapter: Adapter, base: dict[str, Tensor]) -> None:
        adapter.meta["modules"]["q"] |= {"bias": True, "base_shape": [4, 6]}
        adapter.tensors["q.bias"] = noise("s", "F32", 4)

    def flipped(adapter: Adapter, base: dict[str, Tensor]) -> None:
        old = base["q.weight"]
        base["q.weight"] = Tensor(old.dtype, old.shape, (old.bits[0] ^ 1, *old.bits[1:]))

    def recast(adapter: Adapter, base: dict[str, Tensor]) -> None:
        base["q.weight"] = Tensor("BF16", base["q.weight"].shape, base["q.weight"].bits)

    bat, mini = ("bat", {"q": (2, 4, 6)}), ("mini", {"q": (2, 4, 6)})
    head, wider = noise("s", "F32", 3, 4), noise("t", "F32", 3, 5)
    return {
        "base-without-weight": changed("R28", "an adapted weight under another name", renamed),
        "base-without-bias": changed("R28", "a bias that the base does not have", biased),
        "base-without-replaced": changed(
            "R28", "a replaced tensor that is neither there nor added", saved(head, None)
        ),
        "base-out": changed("R29", "other out-features", weight("F32", 5, 6)),
        "base-one-dimension": changed("R29", "a weight of one dimension", weight("F32", 4)),
        "base-conv": changed(
            "R29", "a convolution that base_shape does not announce", weight("F32", 4, 6, 1, 1)
        ),
        "base-other-shape": changed(
            "R29", "another shape than base_shape", weight("F32", 4, 8), shapes=True
        ),
        "base-bat-ragged": changed(
            "R29",
            "in-features that the rank does not divide",
            weight("F32", 4, 5),
            *bat,
            axis="out",
        ),
        "base-bat-axis": changed(
            "R29", "blocks for the other axis", weight("F32", 6, 4), *bat, axis="out"
        ),
        "base-mini": changed(
            "R29", "out-features that mini_rank does not divide", weight("F32", 5, 6), *mini, mini=2
        ),
        "base-integer": changed(
            "R29",
            "a base of integers",
            lambda a, b: b.update({"q.weight": Tensor("U8", (4, 6), (0,) * 24)}),
        ),
        "base-replaced-shape": changed(
            "R29", "a replaced tensor of another shape", saved(head, wider)
        ),
        "base-replaced-rows": changed(
            "R29", "more rows, without vocab_size", saved(noise("u", "F32", 5, 4), head)
        ),
        "base-one-bit": changed(
            "R30",
            "one bit of one weight differs",
            flipped,
            "bone",
            {"q": (2, 4, 6)},
            "BF16 BF16",
            mark=True,
        ),
        "base-dtype": changed(
            "R30",
            "the same bits, another dtype",
            recast,
            "bone",
            {"q": (2, 4, 6)},
            "BF16 F16",
            mark=True,
        ),
        "base-nan": changed("R31", "NaN in an adapted weight", one("q.weight", "F32", 0x7FC00000)),
        "base-infinity": changed(
            "R31", "infinity in an adapted weight", one("q.weight", "BF16", 0xFF80)
        ),
        "overflow-f16": changed("R31", "a tie at the end of float16 overflows", brink),
        "overflow-strength": changed(
            "R31", "a strength that overflows", lambda *_: None, strength=1e300
        ),
    }


def digests() -> list[dict[str, Any]]:
    """Digests of long tensors; byte i of each is i modulo 251."""
    rows = []
    sizes = [("F32", [0]), ("U8", [1]), ("BF16", [3, 5]), ("U8", [LEAF]), ("BF16", [LEAF // 2 + 1])]
    for dtype, shape in [*sizes, ("F32", [768, 1024]), ("BF16", [3, 7, 1, 1, 99991])]:
        count = math.prod(shape) * WIDTHS[dtype]
        data = (bytes(range(251)) * (count // 251 + 1))[:count]
        name = f"digests/{dtype}-{'x'.join(map(str, shape))}"
        row = {"name": name, "dtype": dtype, "shape": shape, "bytes": count}
        rows.append(row | {"digest": digest(dtype, shape, data)})
    return rows


def main() -> None:
    """Write all vectors, in place of the old ones."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "vectors"
    for kind in ("valid", "invalid"):
        shutil.rmtree(folder / kind, ignore_errors=True)
    for make in (variants, modules, strengths, roundings, formats):
        for name, case in make().items():
            write_case(folder / "valid" / name, case)
    errors = {rule: error for error, rules in ERRORS.items() for rule in rules.split()}
    for make in (containers, metadata, tensors, configs, bases):
        for name, bad in make().items():
            place = folder / "invalid" / f"{bad.rule.lower()}-{name}"
            about: dict[str, Any] = {"title": bad.title, "rule": bad.rule}
            about |= {"error": errors[bad.rule]}
            about["adapters"] = [{"path": "adapter", "strength": bad.strength}]
            write(place / "adapter" / "adapter_model.safetensors", bad.file)
            if bad.config is not None:
                write(place / "adapter" / "adapter_config.json", bad.config)
            if bad.base is not None:
                write(place / "base.safetensors", packed(*laid_out(bad.base, {})))
                about["base"] = "base.safetensors"
            write_json(place / "case.json", about)
    write_json(folder / "digests.json", digests())


if __name__ == "__main__":
    main()
