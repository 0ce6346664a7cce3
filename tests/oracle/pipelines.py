"""A tiny Stable Diffusion pipeline, adapters of its components, and what PEFT makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.oracle.models import SEED
from tests.oracle.quiet import quiet_peft

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RANK = 8
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"],
    "text_encoder": ["q_proj", "v_proj", "fc1"],
}

_WIDTH = 16
_WORDS = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]


def make_pipeline(folder: Path) -> Path:
    """Write a StableDiffusionPipeline of random weights, with a tokenizer of six words."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(SEED)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(),
        tokenizer=_tokenizer(folder.with_name(f"{folder.name}-words")),
        unet=_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return folder


def make_pipeline_adapter(pipeline: Path, component: str, variant: str, folder: Path) -> Path:
    """Let PEFT save an adapter of random blocks for a component."""
    import torch
    from peft import BoneConfig, get_peft_model

    generator = torch.Generator().manual_seed(SEED)
    with quiet_peft():
        config = BoneConfig(
            r=RANK,
            target_modules=TARGETS[component],
            init_weights="bat" if variant == "bat" else True,
        )
        model = get_peft_model(load_component(pipeline, component), config)
        for name, parameter in model.named_parameters():
            if "bone_block" in name:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
    return folder


def load_component(pipeline: Path, component: str) -> Any:
    """A component in float32, loaded by its own class."""
    import diffusers
    import torch
    import transformers

    library, name = json.loads((pipeline / "model_index.json").read_text())[component]
    found = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    return found.from_pretrained(pipeline / component, dtype=torch.float32).eval()


def merged_by_peft(pipeline: Path, component: str, adapter: Path) -> Any:
    """A component with an adapter merged into it by PEFT, in float32."""
    from peft import PeftModel

    with quiet_peft():
        adapted = PeftModel.from_pretrained(load_component(pipeline, component), adapter)
        return adapted.merge_and_unload().eval()


def output_of(component: str, model: torch.nn.Module) -> Tensor:
    """What a UNet or a text encoder makes of fixed inputs."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        if component == "unet":
            image = torch.randn(2, 4, 8, 8, generator=generator)
            text = torch.randn(2, 5, _WIDTH, generator=generator)
            return model(image, torch.tensor([7, 300]), encoder_hidden_states=text)[0]  # type: ignore[no-any-return]
        ids = torch.randint(2, len(_WORDS), (2, 7), generator=generator)
        return model(ids)[0]  # type: ignore[no-any-return]


def image_of(folder: Path) -> Tensor:
    """The latent image that the whole pipeline, loaded by diffusers, makes of a prompt."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        "a b",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    )
    latents: Tensor = made.images
    return latents


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, _WIDTH),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_WIDTH,
        norm_num_groups=4,
        attention_head_dim=4,
    )


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8, _WIDTH],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
    )


def _text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(_WORDS),
            hidden_size=_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(_WORDS)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)
