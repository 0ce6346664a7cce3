"""Questions for a model: prompts as its tokenizer has them, random ids, noise for image models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from boneconv.behaviour.loading import accepted, image_shape, quiet
from boneconv.behaviour.prompts import Prompts, Question, random_ids, random_images
from boneconv.errors import UsageError

__all__ = ["MOST_POSITIONS", "make_questions"]

#: All text together has at most this many tokens: their logits are kept in memory.
MOST_POSITIONS = 1024
_FEWEST = 8
_DECODED = 8


def make_questions(
    model: Any, folder: Path, tokenizer: Any, prompts: Prompts
) -> tuple[list[Question], list[str]]:
    """The questions, and what should be known of them.

    Args:
        model: A model of transformers.
        folder: Its checkpoint, whose processor may say how large an image is.
        tokenizer: Its tokenizer; None where there is none.
        prompts: The texts.

    Raises:
        UsageError: The model takes neither text nor images, or prompts were given for a model that
            cannot read them.
    """
    names = accepted(model)
    if "input_ids" in names:
        return _texts(model, names, tokenizer, prompts)
    if prompts.origin == "file":
        raise UsageError(f"{type(model).__name__} takes no text, and prompts were given")
    if "pixel_values" in names:
        images = random_images(image_shape(model, folder))
        return [Question("images", {"pixel_values": image}) for image in images], []
    raise UsageError(
        "only models of text or of images can be compared",
        found=f"{type(model).__name__}, which takes {', '.join(sorted(names)[:4])}",
    )


def _texts(
    model: Any, names: frozenset[str], tokenizer: Any, prompts: Prompts
) -> tuple[list[Question], list[str]]:
    notes: list[str] = []
    rows = int(model.get_input_embeddings().weight.shape[0])
    found: list[Question] = []
    if tokenizer is None:
        if prompts.origin == "file":
            raise UsageError(
                "prompts need a tokenizer", hint="Put the base's tokenizer files into its folder"
            )
        notes.append("there is no tokenizer: random token ids stand for text")
    else:
        found = _tokenized(model, names, tokenizer, prompts, rows, notes)
    found += [_question("random", ids, model, names) for ids in random_ids(_plain(model, rows))]
    if "pixel_values" in names:
        notes.append("text alone is compared: what the model does with images is not")
    return found, notes


def _tokenized(
    model: Any,
    names: frozenset[str],
    tokenizer: Any,
    prompts: Prompts,
    rows: int,
    notes: list[str],
) -> list[Question]:
    longest = max(MOST_POSITIONS // len(prompts.texts), _FEWEST)
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = min(longest, limit // 2) if isinstance(limit, int) and limit > 1 else longest
    found, cut = [], 0
    for text in prompts.texts:
        with quiet():
            ids = list(tokenizer(text)["input_ids"])
        cut += len(ids) > longest
        ids = ids[:longest]
        if ids and max(ids) < rows:
            found.append(_question("text", np.asarray([ids], np.int64), model, names))
    if cut:
        notes.append(f"{cut} of {len(prompts.texts)} prompts were cut to {longest} tokens")
    if len(found) < len(prompts.texts):
        left = len(prompts.texts) - len(found)
        notes.append(f"{left} prompts have no tokens, or some that the model lacks: left out")
    return found


def _plain(model: Any, rows: int) -> int:
    """How many ids may be drawn: those above may be placeholders for images."""
    special = [getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")]
    known = [i for i in special if isinstance(i, int) and i > 0]
    return min([rows, *known])


def _question(
    kind: str, ids: np.ndarray[Any, Any], model: Any, names: Sequence[str] | frozenset[str]
) -> Question:
    inputs = {"input_ids": ids}
    if "attention_mask" in names:
        inputs["attention_mask"] = np.ones_like(ids)
    if "token_type_ids" in names and (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = np.zeros_like(ids)
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = ids[:, ::-1][:, :_DECODED].copy()
    return Question(kind, inputs)
