"""Which task a model is traced for."""

from __future__ import annotations

from typing import Any

import pytest

from boneconv.errors import UsageError
from boneconv.onnx.tracing.tasks import TASKS, choose_task


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "text-generation-with-past"),
        ("GPTNeoXForCausalLM", "text-generation-with-past"),
        ("GPT2LMHeadModel", "text-generation-with-past"),
        ("BertModel", "feature-extraction"),
        ("ViTModel", "feature-extraction"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertForSequenceClassification", "text-classification"),
        ("LlamaForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("ViTForImageClassification", "image-classification"),
    ],
)
def test_auto_goes_by_the_first_architecture(architecture: str, task: str) -> None:
    assert choose_task({"architectures": [architecture, "Other"]}).name == task


def test_a_named_task_goes_before_the_architecture() -> None:
    config = {"architectures": ["LlamaForCausalLM"]}
    assert choose_task(config, "feature-extraction") is TASKS["feature-extraction"]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": None},
        {"architectures": []},
        {"architectures": [7]},
        {"architectures": ["WhatIsThis"]},
        {"architectures": ["LlavaForConditionalGeneration"]},
    ],
)
def test_an_architecture_of_no_task_is_refused_with_the_way_out(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--task"):
        choose_task(config)


def test_an_unknown_task_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"text-generation-with-past.*'summarize'"):
        choose_task({"architectures": ["LlamaForCausalLM"]}, "summarize")


@pytest.mark.parametrize("task", ["auto", "feature-extraction"])
def test_encoder_decoders_are_refused_whatever_the_task(task: str) -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    with pytest.raises(UsageError, match=r"T5ForConditionalGeneration.*--graph"):
        choose_task(config, task)


def test_every_task_names_a_class_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for task in TASKS.values():
        assert hasattr(transformers, task.auto_class), task.name
