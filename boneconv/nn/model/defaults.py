"""Which modules are adapted where ``target_modules`` is absent: a table by architecture.

The entries up to ``rwkv7`` say what PEFT 0.18.1 does for Bone
(``TRANSFORMERS_MODELS_TO_BONE_TARGET_MODULES_MAPPING``), so that the same configuration adapts the
same modules. ``gpt2`` and ``btlm`` are left out: PEFT names modules there that are no linear layers
(transformers' ``Conv1D``), and refuses them. The entries after it are for architectures that PEFT
has no default for; they follow its habit, query and value projections (or the one module that holds
both), under the names that transformers 5.23 gives them.
"""

from __future__ import annotations

__all__ = ["DEFAULT_TARGETS"]

_QUERY_VALUE_PROJ = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")
_FUSED = ("query_key_value",)

#: ``model_type`` of the model's configuration -> names of the modules, as ``target_modules`` has
#: them.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "bart": _QUERY_VALUE_PROJ,
    "bert": _QUERY_VALUE,
    "blip-2": ("q", "v", *_QUERY_VALUE_PROJ),
    "bloom": _FUSED,
    "chatglm": _FUSED,
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "electra": _QUERY_VALUE,
    "falcon": _FUSED,
    "gemma": _QUERY_VALUE_PROJ,
    "gemma2": _QUERY_VALUE_PROJ,
    "gemma3_text": _QUERY_VALUE_PROJ,
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": _QUERY_VALUE_PROJ,
    "gpt_neox": _FUSED,
    "gptj": _QUERY_VALUE_PROJ,
    "layoutlm": _QUERY_VALUE,
    "llama": _QUERY_VALUE_PROJ,
    "llama4": _QUERY_VALUE_PROJ,
    "mistral": _QUERY_VALUE_PROJ,
    "mixtral": _QUERY_VALUE_PROJ,
    "mpt": ("Wqkv",),
    "mt5": ("q", "v"),
    "opt": _QUERY_VALUE_PROJ,
    "phi": (*_QUERY_VALUE_PROJ, "fc1", "fc2"),
    "qwen2": _QUERY_VALUE_PROJ,
    "qwen3": _QUERY_VALUE_PROJ,
    "RefinedWeb": _FUSED,
    "RefinedWebModel": _FUSED,
    "roberta": _QUERY_VALUE,
    "stablelm": _QUERY_VALUE_PROJ,
    "t5": ("q", "v"),
    "xlm-roberta": _QUERY_VALUE,
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
    "clip": _QUERY_VALUE_PROJ,
    "clip_text_model": _QUERY_VALUE_PROJ,
    "cohere": _QUERY_VALUE_PROJ,
    "distilbert": ("q_lin", "v_lin"),
    "granite": _QUERY_VALUE_PROJ,
    "modernbert": ("Wqkv",),
    "mpnet": ("q", "v"),
    "olmo": _QUERY_VALUE_PROJ,
    "olmo2": _QUERY_VALUE_PROJ,
    "phi3": ("qkv_proj",),
    "qwen2_moe": _QUERY_VALUE_PROJ,
    "qwen3_moe": _QUERY_VALUE_PROJ,
    "smollm3": _QUERY_VALUE_PROJ,
    "starcoder2": _QUERY_VALUE_PROJ,
    "vit": _QUERY_VALUE_PROJ,
    "whisper": _QUERY_VALUE_PROJ,
}
