"""A pipeline shaped like Stable Diffusion 1.5, tiny and random."""

from __future__ import annotations

from typing import Any

import torch

WIDTH = 32


def tiny_unet() -> Any:
    """The UNet: two levels, one of them with attention between 1x1 convolutions."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(5)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(WIDTH, 2 * WIDTH),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def unet_inputs() -> dict[str, torch.Tensor]:
    """One noisy image, a time and a text of five tokens."""
    generator = torch.Generator().manual_seed(6)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 9]),
        "encoder_hidden_states": torch.randn(2, 5, WIDTH, generator=generator),
    }


def tiny_text_encoder() -> Any:
    """The text encoder: CLIP with two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(4)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=99,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=2,
        )
    ).eval()


def tiny_pipeline() -> Any:
    """The pipeline, without a tokenizer and a safety checker."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=[WIDTH, 2 * WIDTH],
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        norm_num_groups=8,
    ).eval()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=tiny_text_encoder(),
        tokenizer=None,
        unet=tiny_unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
