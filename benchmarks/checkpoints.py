"""Llama checkpoints of any size with random weights, and Bone and BAT adapters for them.

    python benchmarks/checkpoints.py FOLDER --size 1b

Writes FOLDER/base (bfloat16, sharded), FOLDER/bone and FOLDER/bat (float32 blocks of rank 64 on all
linear layers). Nothing is held in memory but a few megabytes.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from boneconv.dtypes import BF16
from boneconv.io.safetensors import layout, write_tensors

RANK = 64
_PART = 1 << 22


@dataclass(frozen=True)
class Size:
    """The shape of a Llama."""

    hidden: int
    inner: int
    layers: int
    key_value: int
    vocabulary: int
    shards: int

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one block: name -> [out, in]."""
        h, i, kv = self.hidden, self.inner, self.key_value
        return {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (i, h),
            "mlp.up_proj": (i, h),
            "mlp.down_proj": (h, i),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """All tensors: name -> shape."""
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden)
        }
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            found |= {f"{prefix}.{name}.weight": shape for name, shape in self.modules.items()}
            found[f"{prefix}.input_layernorm.weight"] = (self.hidden,)
            found[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden,)
        found["model.norm.weight"] = (self.hidden,)
        found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found

    @property
    def parameters(self) -> int:
        """How many numbers all tensors hold."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.key_value // 64,
            "head_dim": 64,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


SIZES = {
    "tiny": Size(256, 704, 2, 64, 1000, 2),
    "300m": Size(1024, 2816, 22, 256, 32000, 2),
    "1b": Size(2048, 5632, 22, 256, 32000, 4),
    "4b": Size(3072, 8192, 36, 1024, 32000, 8),
}


def make(folder: Path, size: Size) -> None:
    """Writes the base and both adapters."""
    _make_base(folder / "base", size)
    for variant in ("bone", "bat"):
        _make_adapter(folder / variant, size, variant)


def _make_base(folder: Path, size: Size) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = size.tensors()
    total = 2 * size.parameters
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        if filled >= total / size.shards * len(groups):
            groups.append({})
        groups[-1][name] = shape
        filled += 2 * math.prod(shape)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(group, file)
        head, _, _ = layout([(n, "BF16", s) for n, s in group.items()], {"format": "pt"})
        with (folder / file).open("wb") as out:
            out.write(head)
            for shape in group.values():
                for begin in range(0, math.prod(shape), _PART):
                    count = min(_PART, math.prod(shape) - begin)
                    part = rng.standard_normal(count, dtype=np.float32) * np.float32(0.02)
                    out.write(part.astype(BF16).tobytes())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(size.config(), indent=2))


def _make_adapter(folder: Path, size: Size, variant: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    blocks = {}
    for layer in range(size.layers):
        for name, (out, _) in size.modules.items():
            shape = (RANK, out) if variant == "bone" else (out // RANK, RANK, RANK)
            key = f"base_model.model.model.layers.{layer}.{name}.bone_block"
            blocks[key] = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.005)
    write_tensors(folder / "adapter_model.safetensors", blocks, {"format": "pt"})
    config = {
        "peft_type": "BONE",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "init_weights": True if variant == "bone" else "bat",
        "target_modules": sorted(name.split(".")[-1] for name in size.modules),
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1b")
    options = parser.parse_args()
    make(options.folder, SIZES[options.size])
