"""Running a graph in ONNX Runtime: a prompt at once, what follows token by token where it can.

A graph with past inputs gets an empty past for the prompt; each token after it is a run of its own
with the keys and values that came before, as in generation. So both uses of the graph are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from boneconv.behaviour.measures import Answers
from boneconv.behaviour.prompts import Question
from boneconv.errors import UsageError, first_line
from boneconv.strict_json import read_object

__all__ = ["GraphRunner"]

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
_KNOWN = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "pixel_values",
    "decoder_input_ids",
)
Feeds = Mapping[str, np.ndarray[Any, Any]]


class GraphRunner:
    """A graph in ONNX Runtime on the CPU.

    Args:
        path: Its file.
        adapter: An ``.onnx_adapter`` file that is active in every run.
        computes: The dtype that it was changed to compute in, for its name.

    Raises:
        UsageError: The graph takes inputs that cannot be made.
        ValueError: ONNX Runtime does not load it.
    """

    def __init__(
        self, path: Path, adapter: Path | None = None, *, computes: str | None = None
    ) -> None:
        self._computes = computes
        runtime = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            # RunOptions do not keep the adapter alive, so it is kept here.
            self._adapter = None if adapter is None else runtime.LoraAdapter()
            if self._adapter is not None:
                self._adapter.Load(str(adapter))
        except Exception as error:
            raise ValueError(
                f"ONNX Runtime does not load the graph: {first_line(error)}"
            ) from error
        self._inputs = {each.name: each for each in self._session.get_inputs()}
        self.outputs = tuple(each.name for each in self._session.get_outputs())
        self._past = {name: each for name, each in self._inputs.items() if "past" in name}
        self._head_size = _head_size(path.parent)
        strange = [n for n in self._inputs if n not in _KNOWN and n not in self._past]
        if strange:
            raise UsageError(
                "the graph takes inputs that cannot be made for a comparison",
                path=path,
                expected=", ".join(_KNOWN),
                found=", ".join(strange),
            )

    @property
    def name(self) -> str:
        """What runs, with its version."""
        name = f"ONNX Runtime {import_module('onnxruntime').__version__}"
        return name if self._computes is None else f"{name}, {self._computes}"

    def answers(self, questions: Sequence[Question], output: str) -> Iterator[Answers]:
        """What the graph gives to each question, ``[positions, width]``.

        A graph without an output of that name is taken by its first.

        Raises:
            ValueError: ONNX Runtime fails.
        """
        taken = output if output in self.outputs else self.outputs[0]
        for question in questions:
            found = self._answer(question, taken)
            yield found.reshape(-1, found.shape[-1])

    def _answer(self, question: Question, output: str) -> np.ndarray[Any, Any]:
        if not self._past or not question.prompt:
            return self._run(question.inputs, 0, {})[output]
        ids = question.inputs["input_ids"]
        parts: list[np.ndarray[Any, Any]] = []
        past: dict[str, np.ndarray[Any, Any]] = {}
        done = 0
        for end in (question.prompt, *range(question.prompt + 1, question.length + 1)):
            step = {**question.inputs, "input_ids": ids[:, done:end]}
            results = self._run(step, done, past)
            parts.append(results[output])
            past = {
                target: results[name]
                for name in results
                if (target := _past_name(name)) in self._past
            }
            done = end
        return np.concatenate(parts, 1)

    def _run(self, inputs: Feeds, before: int, past: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        feeds = {
            name: self._feed(name, each, inputs, before, past)
            for name, each in self._inputs.items()
        }
        runtime = import_module("onnxruntime")
        options = runtime.RunOptions()
        options.log_severity_level = 4
        if self._adapter is not None:
            options.add_active_adapter(self._adapter)
        try:
            results = self._session.run(None, feeds, options)
        except Exception as error:
            raise ValueError(f"ONNX Runtime cannot run the graph: {first_line(error)}") from error
        return dict(zip(self.outputs, results, strict=True))

    def _feed(
        self, name: str, given: Any, inputs: Feeds, before: int, past: Feeds
    ) -> np.ndarray[Any, Any]:
        dtype = _TYPES[given.type]
        if name in self._past:
            if name in past:
                return past[name]
            shape = [size if isinstance(size, int) else 0 for size in given.shape]
            return np.zeros((1, *shape[1:-1], shape[-1] or self._head_size), dtype)
        tokens = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        if name == "attention_mask":
            return np.ones((1, before + tokens), dtype)
        if name == "position_ids":
            return np.arange(before, before + tokens, dtype=dtype)[None]
        if name == "token_type_ids":
            return np.zeros((1, tokens), dtype)
        if name not in inputs:
            raise ValueError(f"the graph takes {name}, which the model does not")
        return inputs[name].astype(dtype)


def _head_size(folder: Path) -> int:
    """The width of keys and values that onnxruntime-genai's builder leaves open in its graphs."""
    config = folder / "genai_config.json"
    if not config.is_file():
        return 0
    decoder = read_object(config).get("model", {}).get("decoder", {})
    return int(decoder.get("head_size", 0))


def _past_name(output: str) -> str:
    """The input that takes what an output gives."""
    renamed = output.replace("present.", "past_key_values.")
    renamed = renamed.replace("present_", "past_")
    return renamed.replace("output.past_key_values.", "input.past_key_values.")
