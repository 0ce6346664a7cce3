"""Tiny random models, each of one architecture, and what their forward pass is fed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

VOCAB = 128
MORE_VOCAB = VOCAB + 8
HIDDEN = 32
WIDE = 64
LAYERS = 2
HEADS = 4
TOKENS = 7
IMAGE_TOKEN = 4
SEED = 20240915

Inputs = dict[str, "Tensor"]


def token_inputs(vocabulary: int = VOCAB) -> Inputs:
    import torch

    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(5, VOCAB, (2, TOKENS), generator=generator)
    if vocabulary > VOCAB:
        ids[:, 1] = torch.arange(VOCAB, VOCAB + 2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def resized_inputs() -> Inputs:
    return token_inputs(MORE_VOCAB)


def _text_sizes(hidden: int = HIDDEN) -> dict[str, int]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
    }


def _special_tokens() -> dict[str, int]:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _llama(*, tied: bool) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            **_text_sizes(), **_special_tokens(), num_key_value_heads=2, tie_word_embeddings=tied
        )
    )


def llama_tied() -> PreTrainedModel:
    return _llama(tied=True)


def llama_untied() -> PreTrainedModel:
    return _llama(tied=False)


def qwen2() -> PreTrainedModel:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            **_text_sizes(), **_special_tokens(), num_key_value_heads=2, tie_word_embeddings=True
        )
    )


def gpt_neox() -> PreTrainedModel:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**_text_sizes(), **_special_tokens()))


def opt() -> PreTrainedModel:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            **_special_tokens(),
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=WIDE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=64,
        )
    )


def bert_classifier() -> PreTrainedModel:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_text_sizes(), num_labels=3))


def bert_headless() -> PreTrainedModel:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**_text_sizes(), num_labels=3))


def vit() -> PreTrainedModel:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = _text_sizes()
    del sizes["vocab_size"], sizes["max_position_embeddings"]
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3))


def image_inputs() -> Inputs:
    import torch

    generator = torch.Generator().manual_seed(SEED)
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def t5() -> PreTrainedModel:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=WIDE,
            num_layers=LAYERS,
            num_heads=HEADS,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def t5_inputs() -> Inputs:
    inputs = token_inputs()
    return inputs | {"decoder_input_ids": inputs["input_ids"].flip(1)[:, :4]}


def mixtral() -> PreTrainedModel:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            **_text_sizes(),
            **_special_tokens(),
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )


def llava() -> PreTrainedModel:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=16,
        patch_size=8,
        projection_dim=HIDDEN,
    )
    text = LlamaConfig(**_text_sizes(), **_special_tokens(), num_key_value_heads=2)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE_TOKEN,
            vision_feature_layer=-1,
            image_seq_length=4,
            tie_word_embeddings=False,
        )
    )


def llava_inputs() -> Inputs:
    inputs = token_inputs()
    inputs["input_ids"][:, 1:5] = IMAGE_TOKEN
    return inputs | image_inputs()


def qwen2_vl() -> PreTrainedModel:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        **_text_sizes(),
        **_special_tokens(),
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    }
    vision = {
        "depth": LAYERS,
        "embed_dim": HIDDEN,
        "hidden_size": HIDDEN,
        "mlp_ratio": 2,
        "num_heads": HEADS,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=IMAGE_TOKEN,
            video_token_id=3,
            vision_start_token_id=1,
            vision_end_token_id=2,
            tie_word_embeddings=False,
        )
    )


def qwen2_vl_inputs() -> Inputs:
    import torch

    inputs = token_inputs()
    inputs["input_ids"][:, 0] = 1
    inputs["input_ids"][:, 1:5] = IMAGE_TOKEN
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    generator = torch.Generator().manual_seed(SEED)
    # Two images of 4 x 4 patches, each merged 2 x 2 into the four image tokens above.
    patches = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return inputs | {"pixel_values": patches, "image_grid_thw": grid}
