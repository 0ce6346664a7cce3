"""What a model is traced with: a batch of two, and which of its axes may change afterwards.

Sizes of one would be taken for constants by the tracer, so batch, length and past are two or more,
and each differs from the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from boneconv.errors import UsageError
from boneconv.onnx.tracing.tasks import Task
from boneconv.pretrained import image_size

__all__ = ["BATCH", "LENGTH", "PAST", "Sample", "make_sample", "with_past"]

BATCH, LENGTH, PAST = 2, 7, 5

_BATCH_AXIS = "batch_size"
_TOKENS = {0: _BATCH_AXIS, 1: "sequence_length"}
_ALL_TOKENS = {0: _BATCH_AXIS, 1: "total_sequence_length"}
_CACHE = {0: _BATCH_AXIS, 2: "past_sequence_length"}


@dataclass(frozen=True)
class Sample:
    """The inputs of one forward pass.

    Attributes:
        inputs: Tensors by the model's argument names.
        axes: For every input, the axes that may change, with their names.
        past: Keys and values of earlier tokens, two tensors ``[batch, heads, past, width]`` a
            layer; empty where the graph takes none.
    """

    inputs: Mapping[str, Any]
    axes: Mapping[str, Mapping[int, str]]
    past: tuple[tuple[Any, Any], ...] = ()

    @property
    def past_axes(self) -> dict[str, Mapping[int, str]]:
        """The same as `axes`, for the past under the names that a graph gives it."""
        return {
            f"past_key_values.{layer}.{part}": _CACHE
            for layer in range(len(self.past))
            for part in ("key", "value")
        }


def make_sample(model: Any, task: Task, folder: Path) -> Sample:
    """Inputs for a model, without a past.

    Args:
        model: A model of transformers.
        task: What it is traced for.
        folder: Its checkpoint, whose preprocessor may say how large an image is.

    Raises:
        UsageError: The model takes neither tokens nor images.
    """
    accepted = inspect.signature(model.forward).parameters
    if "pixel_values" in accepted and "input_ids" not in accepted:
        return _images(model, folder)
    if "input_ids" in accepted and "pixel_values" not in accepted:
        return _tokens(model, task, accepted)
    raise UsageError(
        "only models of text or of images are traced",
        path=folder,
        found=f"{type(model).__name__}, which takes {', '.join(list(accepted)[:4])}",
        hint="Patch a graph that exists with --graph",
    )


def _images(model: Any, folder: Path) -> Sample:
    torch = import_module("torch")
    height, width = image_size(model.config, folder)
    channels = getattr(model.config, "num_channels", 3)
    pixels = torch.linspace(-1, 1, BATCH * channels * height * width, dtype=model.dtype)
    images = pixels.reshape(BATCH, channels, height, width)
    return Sample({"pixel_values": images}, {"pixel_values": {0: _BATCH_AXIS}})


def _tokens(model: Any, task: Task, accepted: Iterable[str]) -> Sample:
    torch = import_module("torch")
    ids = (torch.arange(BATCH * LENGTH) * 31 + 5) % model.get_input_embeddings().weight.shape[0]
    inputs = {"input_ids": ids.reshape(BATCH, LENGTH)}
    if "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if task.generates and "position_ids" in accepted:
        inputs["position_ids"] = torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous()
    if "token_type_ids" in accepted and (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    return Sample(inputs, dict.fromkeys(inputs, _TOKENS))


def with_past(model: Any, sample: Sample) -> Sample:
    """The same inputs after `PAST` earlier tokens, whose keys and values are worked out.

    Raises:
        UsageError: The model keeps something else than keys and values of all earlier tokens.
    """
    torch = import_module("torch")
    earlier = {name: tensor[:, :PAST] for name, tensor in sample.inputs.items()}
    with torch.no_grad():
        outputs = model(**earlier, use_cache=True)
    past = _keys_and_values(outputs, model)
    inputs = dict(sample.inputs)
    axes = dict(sample.axes)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones(BATCH, PAST + LENGTH, dtype=torch.long)
        axes["attention_mask"] = _ALL_TOKENS
    if "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"] + PAST
    return Sample(inputs, axes, past)


def _keys_and_values(outputs: Mapping[str, Any], model: Any) -> tuple[tuple[Any, Any], ...]:
    layers = getattr(outputs.get("past_key_values"), "layers", None) or ()
    past = tuple((getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers)
    if not past or not all(_is_cached(tensor) for pair in past for tensor in pair):
        raise UsageError(
            f"{type(model).__name__} does not keep keys and values of all earlier tokens, "
            "so it has no graph with a past",
            hint="Take --task text-generation, which works out all tokens each time",
        )
    return past


def _is_cached(tensor: Any) -> bool:
    """Whether it is ``[batch, heads, earlier tokens, width]``."""
    return getattr(tensor, "ndim", 0) == 4 and tensor.shape[::2] == (BATCH, PAST)
