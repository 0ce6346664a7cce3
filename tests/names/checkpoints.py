"""Tiny random models that transformers itself saves.

Every parameter is drawn at random, so equal content means the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _llava(*, tied: bool) -> Any:
    import transformers as tf

    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**GROUPED, tie_word_embeddings=tied),
        image_token_index=39,
        tie_word_embeddings=tied,
    )
    return tf.LlavaForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    import transformers as tf

    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    text = {**GROUPED, "rope_parameters": ROPE}
    config = tf.Qwen2VLConfig(text_config=text, vision_config={**vision, "mlp_ratio": 2})
    return tf.Qwen2VLForConditionalGeneration(config)


def builder(model: str, config: str, **values: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers as tf

        return getattr(tf, model)(getattr(tf, config)(**values))

    return build


OPT = {k: TEXT[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
OPT |= {"vocab_size": 40, "ffn_dim": 48, "word_embed_proj_dim": 16}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": builder("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "llama tied": builder("LlamaForCausalLM", "LlamaConfig", **GROUPED, tie_word_embeddings=True),
    "llama bare": builder("LlamaModel", "LlamaConfig", **GROUPED),
    "qwen2": builder("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "gpt-neox": builder("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT),
    "gpt-neox bare": builder("GPTNeoXModel", "GPTNeoXConfig", **TEXT),
    "opt": builder("OPTForCausalLM", "OPTConfig", **OPT),
    "bert bare": builder("BertModel", "BertConfig", **TEXT),
    "bert classifier": builder("BertForSequenceClassification", "BertConfig", **TEXT),
    "bert masked": builder("BertForMaskedLM", "BertConfig", **TEXT),
    "vit": builder("ViTForImageClassification", "ViTConfig", **VISION),
    "dinov3": builder("DINOv3ViTModel", "DINOv3ViTConfig", **VISION),
    "t5": builder("T5ForConditionalGeneration", "T5Config", **T5),
    "mixtral": builder("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=2),
    "llava": lambda: _llava(tied=False),
    "llava tied": lambda: _llava(tied=True),
    "qwen2-vl": _qwen2_vl,
}
BY_RENAME = {"dinov3", "gpt-neox", "vit", "llava", "llava tied", "qwen2-vl"}
TIES = {
    "llama tied": {"lm_head.weight": "model.embed_tokens.weight"},
    "opt": {"lm_head.weight": "model.decoder.embed_tokens.weight"},
    "bert masked": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "t5": {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    "llava tied": {"lm_head.weight": "model.language_model.embed_tokens.weight"},
}


@dataclass(frozen=True)
class Base:
    """A saved model: its folder, its tensors on disk, and the model that they came from."""

    folder: Path
    tensors: dict[str, Any]
    model: Any

    def linear_tensors(self) -> dict[str, Any]:
        import torch

        return {
            f"{module_name}.{name}": parameter
            for module_name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear)
            for name, parameter in module.named_parameters()
        }
