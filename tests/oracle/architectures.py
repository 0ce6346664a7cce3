"""The architectures that boneconv promises to merge, each with the adapter that goes with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tests.oracle import models
from tests.oracle.models import Inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DECODER = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """One kind of tiny model and the adapter that goes with it.

    Attributes:
        build: Makes the model that is saved as the base.
        inputs: The keyword arguments of one forward pass, batch size 2, always the same.
        targets: `target_modules` of the adapter's config.
        examples: A module as the adapter names it -> the tensor that holds its weight, as the
            checkpoint names it, for the kinds of layer that the adapter touches.
        model_class: Class the adapter is trained on; `None` is the class of the base.
        base_dtype: Floating dtype of the base on disk.
        task_type: PEFT's task type; `None` leaves it out.
        modules_to_save: Modules that the adapter replaces as a whole.
        vocabulary: Rows the embeddings are resized to before the adapter is attached; the adapter
            then holds them, all their values its own.
        equal: Whether the saved modules hold the same values.
        published_name: A tensor as `save_pretrained` names it -> as the Hub's checkpoints name it,
            where the two differ.
    """

    build: Callable[[], PreTrainedModel]
    inputs: Callable[[], Inputs]
    targets: tuple[str, ...]
    examples: Mapping[str, str]
    model_class: str | None = None
    base_dtype: str = "float32"
    task_type: str | None = "CAUSAL_LM"
    modules_to_save: tuple[str, ...] = ()
    vocabulary: int | None = None
    equal: bool = False
    published_name: Callable[[str], str] | None = None


def _layers(adapter: str, disk: str, *modules: str) -> dict[str, str]:
    """Pairs for modules that only the prefix of their layer tells apart."""
    return {adapter + module: f"{disk}{module}.weight" for module in modules}


_DECODER_LAYER = (
    *(f"self_attn.{name}" for name in ATTENTION),
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_BERT_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_CLIP_LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
_LLAMA = Architecture(
    build=models.llama_tied,
    inputs=models.token_inputs,
    targets=DECODER,
    examples=_layers("model.layers.1.", "model.layers.1.", *_DECODER_LAYER),
)
_GPT_NEOX = Architecture(
    build=models.gpt_neox,
    inputs=models.token_inputs,
    targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    examples=_layers(
        "gpt_neox.layers.1.",
        "gpt_neox.layers.1.",
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
)
_OPT = Architecture(
    build=models.opt,
    inputs=models.token_inputs,
    targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    examples=_layers(
        "model.decoder.layers.1.",
        "model.decoder.layers.1.",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "fc1",
        "fc2",
    ),
)
_BERT = Architecture(
    build=models.bert_classifier,
    inputs=models.token_inputs,
    targets=("query", "key", "value", "dense"),
    examples=_layers("bert.encoder.layer.1.", "bert.encoder.layer.1.", *_BERT_LAYER)
    | _layers("bert.", "bert.", "pooler.dense"),
    task_type="SEQ_CLS",
    modules_to_save=("classifier",),
)
_LLAVA = Architecture(
    build=models.llava,
    inputs=models.llava_inputs,
    targets=(*DECODER, "out_proj", "fc1", "fc2", "linear_1", "linear_2"),
    examples=_layers(
        "model.language_model.layers.1.", "language_model.model.layers.1.", *_DECODER_LAYER
    )
    | _layers(
        "model.vision_tower.encoder.layers.1.", "vision_tower.encoder.layers.1.", *_CLIP_LAYER
    )
    | _layers("model.", "", "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
)


def _published_llava_name(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def _published_opt_name(name: str) -> str:
    return name.removeprefix("model.")


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama-tied": _LLAMA,
    "llama-untied": replace(_LLAMA, build=models.llama_untied),
    "qwen2": replace(_LLAMA, build=models.qwen2, base_dtype="float16"),
    "gpt-neox": _GPT_NEOX,
    "gpt-neox-lm-head": replace(
        _GPT_NEOX,
        modules_to_save=("lm_head",),
        examples={**_GPT_NEOX.examples, "lm_head": "embed_out.weight"},
    ),
    "opt": _OPT,
    "opt-headless": replace(
        _OPT,
        published_name=_published_opt_name,
        examples={module: name.removeprefix("model.") for module, name in _OPT.examples.items()},
    ),
    "bert": replace(_BERT, examples={**_BERT.examples, "classifier": "classifier.weight"}),
    "bert-headless": replace(
        _BERT,
        build=models.bert_headless,
        model_class="BertForSequenceClassification",
        examples={module: name.removeprefix("bert.") for module, name in _BERT.examples.items()},
    ),
    "vit": Architecture(
        build=models.vit,
        inputs=models.image_inputs,
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        examples={
            "vit.layers.1.attention.q_proj": "vit.encoder.layer.1.attention.attention.query.weight",
            "vit.layers.1.attention.k_proj": "vit.encoder.layer.1.attention.attention.key.weight",
            "vit.layers.1.attention.v_proj": "vit.encoder.layer.1.attention.attention.value.weight",
            "vit.layers.1.attention.o_proj": "vit.encoder.layer.1.attention.output.dense.weight",
            "vit.layers.1.mlp.fc1": "vit.encoder.layer.1.intermediate.dense.weight",
            "vit.layers.1.mlp.fc2": "vit.encoder.layer.1.output.dense.weight",
            "classifier": "classifier.weight",
        },
        task_type=None,
        modules_to_save=("classifier",),
    ),
    "t5": Architecture(
        build=models.t5,
        inputs=models.t5_inputs,
        targets=("q", "k", "v", "o", "wi", "wo"),
        examples=_layers(
            "encoder.block.1.",
            "encoder.block.1.",
            "layer.0.SelfAttention.q",
            "layer.1.DenseReluDense.wo",
        )
        | _layers(
            "decoder.block.1.",
            "decoder.block.1.",
            "layer.1.EncDecAttention.v",
            "layer.2.DenseReluDense.wi",
        ),
        task_type=None,
    ),
    "mixtral": replace(
        _LLAMA,
        build=models.mixtral,
        targets=ATTENTION,
        examples=_layers("model.layers.1.self_attn.", "model.layers.1.self_attn.", *ATTENTION),
    ),
    "llava": replace(
        _LLAVA,
        published_name=_published_llava_name,
        examples={module: _published_llava_name(name) for module, name in _LLAVA.examples.items()},
    ),
    "llava-resaved": _LLAVA,
    "qwen2-vl": Architecture(
        build=models.qwen2_vl,
        inputs=models.qwen2_vl_inputs,
        targets=(*DECODER, "attn.qkv", "attn.proj", "fc1", "fc2", "mlp.0", "mlp.2"),
        examples=_layers("model.language_model.layers.1.", "model.layers.1.", *_DECODER_LAYER)
        | _layers(
            "model.visual.",
            "visual.",
            "blocks.1.attn.qkv",
            "blocks.1.attn.proj",
            "blocks.1.mlp.fc1",
            "blocks.1.mlp.fc2",
            "merger.mlp.0",
            "merger.mlp.2",
        ),
    ),
    "llama-lm-head": replace(_LLAMA, modules_to_save=("lm_head",)),
    "llama-embedding": replace(
        _LLAMA,
        modules_to_save=("embed_tokens",),
        examples={**_LLAMA.examples, "model.embed_tokens": "model.embed_tokens.weight"},
    ),
    "llama-embedding-and-lm-head": replace(
        _LLAMA, modules_to_save=("embed_tokens", "lm_head"), equal=True
    ),
    "llama-resized": replace(_LLAMA, inputs=models.resized_inputs, vocabulary=models.MORE_VOCAB),
    "llama-untied-resized": replace(
        _LLAMA,
        build=models.llama_untied,
        inputs=models.resized_inputs,
        vocabulary=models.MORE_VOCAB,
    ),
}
