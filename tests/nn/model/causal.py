"""A tiny language model, adapters for it and sentences of tokens, for the tests of training."""

from __future__ import annotations

from typing import Any

import torch

from boneconv.config import BoneConfig
from boneconv.nn.model.bone_model import BoneModel

VOCAB = 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CONFIGS = {
    "bone": BoneConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM"),
    "bat": BoneConfig(r=16, target_modules=TARGETS, init_weights="bat", task_type="CAUSAL_LM"),
}


def causal(*, dropout: float = 0.0, layers: int = 2, tied: bool = True, seed: int = 0) -> Any:
    """A Llama 32 wide; the same random weights every time.

    Args:
        dropout: Of the attention's probabilities, while training.
        layers: How many.
        tied: Whether the head is the embedding.
        seed: Of the weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=dropout,
        attn_implementation="eager",
        tie_word_embeddings=tied,
        initializer_range=0.2,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def adapted(kind: str, **options: Any) -> BoneModel:
    """The model with a new adapter of one kind, training."""
    return BoneModel(causal(**options), CONFIGS[kind]).train()


def tokens(rows: int, length: int = 12, seed: int = 5) -> torch.Tensor:
    """Rows of tokens that count upwards, with different steps: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, VOCAB, (rows, 1), generator=generator)
    step = torch.randint(1, 4, (rows, 1), generator=generator)
    return (start + step * torch.arange(length)) % VOCAB


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
