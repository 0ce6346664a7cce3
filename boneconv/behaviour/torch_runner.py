"""Running a model of torch: its answers to questions, and what it says greedily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np

from boneconv.behaviour.loading import quiet
from boneconv.behaviour.measures import Answers
from boneconv.behaviour.prompts import Question

__all__ = ["OUTPUTS", "answers", "extend", "find_output", "greedy_tokens"]

#: What may be compared, the first that a model gives.
OUTPUTS = ("logits", "start_logits", "last_hidden_state", "image_embeds", "pooler_output")


def find_output(model: Any, question: Question, wanted: Sequence[str] = ()) -> str | None:
    """The output of a model that is compared; None where it has none that is known.

    Args:
        model: The model.
        question: One to try it with.
        wanted: The outputs that the candidate has; any without them.
    """
    given = _outputs(model, question)
    for name in OUTPUTS:
        if (not wanted or name in wanted) and getattr(given.get(name), "ndim", 0) >= 2:
            return name
    return None


def answers(model: Any, questions: Sequence[Question], output: str) -> Iterator[Answers]:
    """What a model gives to each question, ``[positions, width]`` in its own dtype."""
    for question in questions:
        found = _outputs(model, question)[output]
        yield found.detach().numpy().reshape(-1, found.shape[-1])


def greedy_tokens(model: Any, question: Question, count: int) -> list[int]:
    """The tokens that a model says greedily after a question, with its cache where it has one."""
    torch = import_module("torch")
    ids = torch.from_numpy(question.inputs["input_ids"])
    said: list[int] = []
    step, past = ids, None
    with torch.no_grad(), quiet():
        while len(said) < count:
            out = model(input_ids=step, past_key_values=past, use_cache=True)
            said.append(int(out.logits[0, -1].argmax()))
            past = out.get("past_key_values")
            new = torch.tensor([said[-1:] if past is not None else said])
            step = new if past is not None else torch.cat([ids, new], 1)
    return said


def extend(question: Question, tokens: Sequence[int]) -> Question:
    """A question with tokens after its own."""
    ids = question.inputs["input_ids"]
    longer = np.concatenate([ids, np.asarray([tokens], np.int64)], 1)
    inputs = {**question.inputs, "input_ids": longer}
    if "attention_mask" in inputs:
        inputs["attention_mask"] = np.ones_like(longer)
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = np.zeros_like(longer)
    return replace(question, inputs=inputs, prompt=int(ids.shape[1]))


def _outputs(model: Any, question: Question) -> Any:
    torch = import_module("torch")
    dtype = next(model.parameters()).dtype
    inputs = {}
    for name, array in question.inputs.items():
        tensor = torch.from_numpy(array)
        inputs[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    with torch.no_grad(), quiet():
        return model(**inputs, return_dict=True)
