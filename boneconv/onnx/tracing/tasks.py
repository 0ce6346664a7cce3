"""What a traced graph is for: the tasks, named as optimum names them.

A task says which of transformers' auto classes loads the model and which of its outputs the graph
gives. ``auto`` reads the architecture that config.json declares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from boneconv.errors import UsageError, listing

__all__ = ["AUTO", "TASKS", "Task", "choose_task"]

AUTO = "auto"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Its name, as optimum has it.
        auto_class: transformers' class that loads a model for it.
        outputs: The model's outputs that the graph gives.
        generates: Whether the model predicts the next token, and hence takes positions.
        past: Whether the graph takes and gives the keys and values of earlier tokens.
    """

    name: str
    auto_class: str
    outputs: tuple[str, ...] = ("logits",)
    generates: bool = False
    past: bool = False


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("text-generation", "AutoModelForCausalLM", generates=True),
        Task("text-generation-with-past", "AutoModelForCausalLM", generates=True, past=True),
        Task("feature-extraction", "AutoModel", ("last_hidden_state",)),
        Task("fill-mask", "AutoModelForMaskedLM"),
        Task("text-classification", "AutoModelForSequenceClassification"),
        Task("token-classification", "AutoModelForTokenClassification"),
        Task("question-answering", "AutoModelForQuestionAnswering", ("start_logits", "end_logits")),
        Task("image-classification", "AutoModelForImageClassification"),
    )
}

#: How the classes of an architecture end, the longer endings first.
_ENDINGS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation-with-past",
    "LMHeadModel": "text-generation-with-past",
    "Model": "feature-extraction",
}

_WAY_OUT = "Patch a graph that exists with --graph, which needs no tracing"


def choose_task(config: Mapping[str, Any], wanted: str = AUTO) -> Task:
    """The task to trace a model for.

    Args:
        config: The content of its config.json.
        wanted: A name of `TASKS`, or ``auto``: the one that the declared architecture is for.

    Raises:
        UsageError: There is no such task, or the architecture is of none.
    """
    if config.get("is_encoder_decoder"):
        raise UsageError(
            "models with an encoder and a decoder need several graphs and are not traced",
            found=_declared(config) or "is_encoder_decoder in config.json",
            hint=_WAY_OUT,
        )
    if wanted != AUTO:
        return _named(wanted)
    declared = _declared(config)
    if not declared:
        raise UsageError(
            "config.json names no architecture to choose the task by",
            hint=f"Say which with --task: {listing(list(TASKS))}",
        )
    for ending, name in _ENDINGS.items():
        if declared.endswith(ending):
            return TASKS[name]
    raise UsageError(
        "no task that can be traced is known for this architecture",
        expected=f"one of {listing(list(TASKS))}",
        found=declared,
        hint=f"Say which with --task, if one fits. {_WAY_OUT}",
    )


def _named(name: str) -> Task:
    if name not in TASKS:
        raise UsageError(
            "no such task", expected=f"{AUTO}, {listing(list(TASKS))}", found=repr(name)
        )
    return TASKS[name]


def _declared(config: Mapping[str, Any]) -> str:
    """The first architecture of a config.json; empty where there is none."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0]
    return ""
