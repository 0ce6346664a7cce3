"""Tiny adapters that are rarer than those of the oracle: odd heads, ties and vocabularies."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from tests.oracle import models
from tests.oracle.architectures import ARCHITECTURES, ATTENTION, DECODER, Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _t5_untied() -> PreTrainedModel:
    return _again(models.t5(), tie_word_embeddings=False)


def _gpt_neox_tied() -> PreTrainedModel:
    return _again(models.gpt_neox(), tie_word_embeddings=True)


def _llava_tied() -> PreTrainedModel:
    return _again(models.llava(), tie_word_embeddings=True)


def _qwen2_vl_tied() -> PreTrainedModel:
    return _again(models.qwen2_vl(), tie_word_embeddings=True)


def _again(model: PreTrainedModel, *, tie_word_embeddings: bool) -> PreTrainedModel:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tie_word_embeddings
    return type(model)(model.config)


def _bert_masked_lm() -> PreTrainedModel:
    from transformers import BertForMaskedLM

    return BertForMaskedLM(models.bert_headless().config)


def _like(name: str, **changes: Any) -> Architecture:
    return dataclasses.replace(ARCHITECTURES[name], **changes)


BOTH = ("embed_tokens", "lm_head")
MORE = models.MORE_VOCAB
RARE: dict[str, Architecture] = {
    # Blocks on the output head, which PEFT saves beside the weight that they belong to.
    "llama-tied-head-block": _like("llama-tied", targets=(*DECODER, "lm_head")),
    "llama-untied-head-block": _like("llama-untied", targets=(*DECODER, "lm_head")),
    "llava-head-block": _like("llava", targets=(*DECODER, "lm_head")),
    "t5-head-block": _like("t5", targets=("q", "lm_head")),
    # Whole modules, of several parameters or none of the vocabulary's.
    "llama-mlp-saved": _like("llama-tied", targets=ATTENTION, modules_to_save=("mlp",)),
    "llama-norms-saved": _like("llama-tied", modules_to_save=("norm", "input_layernorm")),
    "mixtral-gate-saved": _like("mixtral", modules_to_save=("gate",)),
    "llava-projector-saved": _like(
        "llava", targets=DECODER, modules_to_save=("multi_modal_projector",)
    ),
    "llama-token-classifier": _like(
        "llama-tied",
        model_class="LlamaForTokenClassification",
        task_type="TOKEN_CLS",
        modules_to_save=("score",),
    ),
    # Heads and embeddings, tied in every way that there is.
    "llama-different-embeddings": _like("llama-tied", modules_to_save=BOTH),
    "opt-headless-lm-head": _like("opt-headless", modules_to_save=("lm_head",)),
    "opt-headless-embedding": _like("opt-headless", modules_to_save=("embed_tokens",)),
    "gpt-neox-tied-lm-head": _like("gpt-neox", build=_gpt_neox_tied, modules_to_save=("lm_head",)),
    "gpt-neox-tied-embedding": _like(
        "gpt-neox", build=_gpt_neox_tied, modules_to_save=("embed_in",)
    ),
    "llava-tied-lm-head": _like("llava", build=_llava_tied, modules_to_save=("lm_head",)),
    "llava-tied-embedding": _like("llava", build=_llava_tied, modules_to_save=("embed_tokens",)),
    "qwen2-vl-tied-lm-head": _like("qwen2-vl", build=_qwen2_vl_tied, modules_to_save=("lm_head",)),
    "t5-lm-head": _like("t5", modules_to_save=("lm_head",)),
    "t5-shared": _like("t5", modules_to_save=("shared",)),
    "t5-untied-lm-head": _like("t5", build=_t5_untied, modules_to_save=("lm_head",)),
    "bert-mlm-decoder": _like(
        "bert", build=_bert_masked_lm, task_type=None, modules_to_save=("decoder",)
    ),
    "bert-mlm-embedding": _like(
        "bert", build=_bert_masked_lm, task_type=None, modules_to_save=("word_embeddings",)
    ),
    # Resized vocabularies: what is both saved and resized, PEFT writes three times.
    "llama-resized-both": _like("llama-resized", modules_to_save=BOTH),
    "llama-resized-lm-head": _like("llama-resized", modules_to_save=("lm_head",)),
    "llama-resized-embedding": _like("llama-resized", modules_to_save=("embed_tokens",)),
    "llava-resized": _like("llava", vocabulary=MORE, modules_to_save=BOTH),
    "qwen2-vl-tied-resized": _like(
        "qwen2-vl", build=_qwen2_vl_tied, vocabulary=MORE, modules_to_save=BOTH
    ),
    "gpt-neox-resized": _like("gpt-neox", vocabulary=MORE),
    "opt-resized": _like("opt", vocabulary=MORE),
    "t5-resized": _like("t5", vocabulary=MORE),
}
