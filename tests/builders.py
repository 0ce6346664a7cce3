"""Tiny bases and adapters, written straight as safetensors files: no torch, no code under test.

All values are small multiples of 1/16. Every float dtype holds them exactly, and float64 holds
every sum and product that a merge makes of them, so `merged` rounds once and needs no oracle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
F64 = np.dtype(np.float64)

NAMES = {
    F64: "F64",
    F32: "F32",
    F16: "F16",
    BF16: "BF16",
    np.dtype(np.int64): "I64",
    np.dtype(np.uint8): "U8",
    np.dtype(np.bool_): "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}

RANK = 4
HIDDEN, INNER, VOCABULARY = 12, 20, 32
LAYERS = 2
Q, UP, DOWN = "self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Raw:
    """A tensor whose dtype numpy does not know."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


# --- files ------------------------------------------------------------------------------------


def raw_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file of any header, right or wrong; bytes are taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pack(tensors: Mapping[str, Array | Raw], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file that holds tensors in the order given."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, tensor in tensors.items():
        if isinstance(tensor, Raw):
            dtype, content = tensor.dtype, tensor.data
        else:
            dtype, content = NAMES[tensor.dtype], tensor.tobytes()
        header[name] = entry(dtype, list(tensor.shape), len(data), len(data) + len(content))
        data += content
    return raw_file(header, data)


def unpack(path: Path) -> dict[str, Array]:
    """All tensors of a safetensors file with dtypes that numpy knows."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(
            content[8 + length + e["data_offsets"][0] : 8 + length + e["data_offsets"][1]],
            DTYPES[e["dtype"]],
        ).reshape(e["shape"])
        for name, e in header.items()
    }


def unpack_folder(folder: Path) -> dict[str, Array]:
    """All tensors of all safetensors files of a folder."""
    found: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= unpack(path)
    return found


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name; an empty folder's name ends in a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            if not any(path.iterdir()):
                found[f"{name}/"] = b""
        else:
            found[name] = path.read_bytes() if path.exists() else b"a link that leads nowhere"
    return found


# --- tensors ----------------------------------------------------------------------------------


def grid(shape: tuple[int, ...], dtype: np.dtype[Any] = F32, seed: int = 0) -> Array:
    """Random multiples of 1/16 between -2 and 2."""
    rng = np.random.default_rng([seed, *shape])
    return np.asarray(rng.integers(-32, 33, shape) / 16).astype(dtype)


def module(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}"


def base_tensors(
    dtype: np.dtype[Any] = BF16, *, layers: int = LAYERS, seed: int = 0
) -> dict[str, Array | Raw]:
    """An embedding, two layers of three linear weights and a norm, and a buffer of integers."""
    tensors: dict[str, Array | Raw] = {EMBEDDING: grid((VOCABULARY, HIDDEN), dtype, seed)}
    for layer in range(layers):
        tensors[f"{module(layer, Q)}.weight"] = grid((HIDDEN, HIDDEN), dtype, seed + layer)
        tensors[f"{module(layer, UP)}.weight"] = grid((INNER, HIDDEN), dtype, seed + layer)
        tensors[f"{module(layer, DOWN)}.weight"] = grid((HIDDEN, INNER), dtype, seed + layer)
        tensors[f"model.layers.{layer}.norm.weight"] = grid((HIDDEN,), dtype, seed + layer)
    tensors["model.position_ids"] = np.arange(6, dtype=np.int64)
    return tensors


def make_base(
    folder: Path,
    tensors: Mapping[str, Array | Raw] | None = None,
    *,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """A checkpoint folder; without a config, so that names are matched without transformers.

    Args:
        folder: Where; it is made.
        tensors: By default `base_tensors()`.
        shards: Into how many files, with an index where there are several.
        config: The content of config.json.
        metadata: Of each file's header; by default what transformers writes.
        files: Text files beside the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = base_tensors() if tensors is None else tensors
    metadata = {"format": "pt"} if metadata is None else metadata
    if shards == 1:
        (folder / "model.safetensors").write_bytes(pack(tensors, metadata))
    else:
        write_shards(folder, tensors, shards, metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def write_shards(
    folder: Path, tensors: Mapping[str, Array | Raw], shards: int, metadata: Mapping[str, str]
) -> None:
    names = list(tensors)
    each = math.ceil(len(names) / shards)
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = {name: tensors[name] for name in names[i * each : (i + 1) * each]}
        weight_map |= dict.fromkeys(mine, shard)
        (folder / shard).write_bytes(pack(mine, metadata))
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Mapping[str, Any], **more: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    index = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map), **more}
    path.write_text(json.dumps(index, indent=2))
    return path


# --- adapters ---------------------------------------------------------------------------------


def block_for(
    variant: str, weight: tuple[int, ...], *, rank: int = RANK, dtype: np.dtype[Any] = F32, seed=7
) -> Array:
    """A block that fits a weight ``[out, in]``."""
    out = weight[0]
    shape = {"bone": (rank, out), "bat": (out // rank, rank, rank), "mini": (rank, 2)}[variant]
    return grid(shape, dtype, seed)


def blocks_for_all(
    variant: str = "bone", *, rank: int = RANK, dtype: np.dtype[Any] = F32, seed: int = 7
) -> dict[str, Array]:
    """A block for every linear module of `base_tensors`."""
    shapes = {Q: (HIDDEN, HIDDEN), UP: (INNER, HIDDEN), DOWN: (HIDDEN, INNER)}
    return {
        module(layer, name): block_for(variant, shape, rank=rank, dtype=dtype, seed=seed + layer)
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }


INIT_WEIGHTS: dict[str, bool | str] = {"bone": True, "bat": "bat", "mini": "mini"}


def adapter_config(variant: str = "bone", *, rank: int = RANK, **fields: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "peft_type": "MISS" if variant == "mini" else "BONE",
        "r": rank,
        "target_modules": ["down_proj", "q_proj", "up_proj"],
        "init_weights": INIT_WEIGHTS[variant],
        **({"mini_r": 2} if variant == "mini" else {}),
    }
    return config | fields


def adapter_tensors(
    blocks: Mapping[str, Array],
    saved: Mapping[str, Array] | None = None,
    suffix: str = "bone_block",
) -> dict[str, Array | Raw]:
    """Tensors under the names that PEFT gives them."""
    named = {f"base_model.model.{name}.{suffix}": block for name, block in blocks.items()}
    return named | {f"base_model.model.{name}": tensor for name, tensor in (saved or {}).items()}


def make_adapter(
    folder: Path,
    variant: str = "bone",
    *,
    rank: int = RANK,
    blocks: Mapping[str, Array] | None = None,
    saved: Mapping[str, Array] | None = None,
    files: Mapping[str, str] | None = None,
    **fields: Any,
) -> Path:
    """An adapter folder as PEFT writes it; ``fields`` go into its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    config = adapter_config(variant, rank=rank, **fields)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    blocks = blocks_for_all(variant, rank=rank) if blocks is None else blocks
    suffix = "miss_block" if config["peft_type"] == "MISS" else "bone_block"
    tensors = adapter_tensors(blocks, saved, suffix)
    (folder / "adapter_model.safetensors").write_bytes(pack(tensors, {"format": "pt"}))
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


# --- what a merge must give -------------------------------------------------------------------


def merged(
    weight: Array, block: Array, variant: str, *, scale: float = 1.0, dtype: Any = None
) -> Array:
    """The merged weight by the formulas of PEFT's variants, in float64, rounded once."""
    wide = weight.astype(F64).reshape(weight.shape[0], -1)
    rows, columns = wide.shape
    b = block.astype(F64)
    if variant == "bat":
        r = b.shape[-1]
        tiles = wide.reshape(rows // r, r, columns // r, r).transpose(0, 2, 1, 3)
        change = tiles @ b[:, None] + b[:, None]
        delta = change.transpose(0, 2, 1, 3).reshape(rows, columns)
    else:
        over_rows = b[:, np.arange(rows) % b.shape[1]]
        delta = over_rows[np.arange(columns) % b.shape[0]].T
    result = (wide + scale * delta).astype(weight.dtype if dtype is None else dtype)
    return result.reshape(weight.shape) + result.dtype.type(0)


def leaf_digests(content: bytes) -> list[bytes]:
    """The BLAKE3 digests of the leaves of 1 MiB that some bytes are cut into."""
    size = 1024 * 1024
    return [
        blake3.blake3(content[start : start + size]).digest()
        for start in range(0, len(content), size)
    ]


def tree_digest(dtype: str, array: Array) -> str:
    """The digest of a tensor as the specification writes it down."""
    leaves = leaf_digests(array.tobytes())
    shape = ",".join(map(str, array.shape))
    head = f"bone-adapter tensor 1\n{dtype}\n[{shape}]\n{len(leaves)}\n"
    return blake3.blake3(head.encode() + b"".join(leaves)).hexdigest()


def same_bits(one: Array, other: Array) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )
