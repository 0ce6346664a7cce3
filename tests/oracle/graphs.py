"""ONNX graphs of the bases, as the exporters that people use make them.

Tracing SmolLM2 takes a minute and a gigabyte, so its graphs are made once per machine
(`smollm2_graph`); those of the tiny architectures take seconds (`export_graph`). All are made from
the base alone, without an adapter.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tests.oracle.cache import made
from tests.oracle.models import Inputs, token_inputs
from tests.oracle.real import NEW_TOKENS, smollm2

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

__all__ = [
    "Kind",
    "export_graph",
    "genai_generate",
    "graph_feeds",
    "graph_generate",
    "graph_outputs",
    "graph_session",
    "make_graph",
    "smollm2_graph",
]

#: How a graph is made. `torch` keeps weights as they are, `torch-optimized` transposes most and
#: renames them; `exporter` is transformers' OnnxExporter with past keys and values, and
#: `exporter-fused` packs query, key and value; `genai-...` is onnxruntime-genai's builder.
Kind = Literal["torch", "torch-optimized", "exporter", "exporter-fused", "genai-fp32", "genai-fp16"]

RECIPE = "1"
_PAST = 5
#: Of SmolLM2, where a graph leaves it free.
_HEAD_WIDTH = 64


def smollm2_graph(cache: Path, kind: Kind) -> Path:
    """The folder of SmolLM2's graph of a kind; `model.onnx` and its data are in it."""
    base = smollm2(cache)
    versions = "\n".join(
        f"{name}=={importlib.metadata.version(name)}"
        for name in ("onnx", "onnxscript", "onnxruntime-genai")
    )
    return made(
        cache, f"smollm2-{kind}", f"{RECIPE}\n{versions}", lambda out: make_graph(base, kind, out)
    )


def make_graph(base: Path, kind: Kind, out: Path) -> None:
    """Makes the graph of a causal language model in a folder of transformers'.

    Args:
        base: The model's folder.
        kind: How.
        out: An empty folder; gets `model.onnx`.
    """
    if kind in ("genai-fp32", "genai-fp16"):
        _build_genai(base, kind.removeprefix("genai-"), out)
        return
    model = _load(base)
    if kind in ("torch", "torch-optimized"):
        export_graph(model, token_inputs(), out, optimize=kind == "torch-optimized")
    else:
        _export_with_past(model, out, fused=kind == "exporter-fused")


def export_graph(
    model: PreTrainedModel,
    inputs: Inputs,
    out: Path,
    *,
    optimize: bool = False,
    external: bool = True,
) -> Path:
    """Traces a model by `torch.onnx.export(dynamo=True)`, without past keys and values.

    Args:
        model: The model.
        inputs: One forward pass; batch and length become dynamic, sizes of images stay.
        out: A folder that exists; gets `model.onnx`.
        optimize: Whether constants are folded, which transposes most weights.
        external: Whether the weights lie in `model.onnx.data`.
    """
    import torch

    dynamic = torch.export.Dim.DYNAMIC
    shapes = {
        name: {0: dynamic, 1: dynamic} if tensor.dim() == 2 else {0: dynamic}
        for name, tensor in inputs.items()
    }
    model.eval()
    model.config.use_cache = False
    file = out / "model.onnx"
    with _quiet():
        torch.onnx.export(
            model,
            (),
            file,
            kwargs=dict(inputs),
            dynamic_shapes=shapes,
            dynamo=True,
            optimize=optimize,
            external_data=external,
            verbose=False,
        )
    return file


def graph_session(file: Path) -> Any:
    """The graph in ONNX Runtime, on two threads that do not spin."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def graph_outputs(file: Path, inputs: Inputs) -> list[np.ndarray[Any, Any]]:
    """What a graph answers on ONNX Runtime to inputs of torch's."""
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    outputs: list[np.ndarray[Any, Any]] = graph_session(file).run(None, feeds)
    return outputs


def graph_generate(file: Path, ids: Sequence[int], end: int) -> tuple[int, ...]:
    """The tokens that a graph says greedily on ONNX Runtime, with or without past inputs.

    Args:
        file: The graph.
        ids: The prompt.
        end: The end token, which is the last one said.
    """
    session = graph_session(file)
    said: list[int] = []
    past: dict[str, np.ndarray[Any, Any]] = {}
    step = list(ids)
    while len(said) < NEW_TOKENS and (not said or said[-1] != end):
        feeds = graph_feeds(session, step, len(ids) + len(said), past)
        logits, *present = session.run(None, feeds)
        said.append(int(logits[0, -1].argmax()))
        names = [output.name for output in session.get_outputs()[1:]]
        past = {_past_name(name): value for name, value in zip(names, present, strict=True)}
        step = [said[-1]] if past else [*ids, *said]
    return tuple(said)


def _past_name(present: str) -> str:
    """The input that takes what an output gives."""
    renamed = present.replace("present.", "past_key_values.")
    return renamed.replace("output.past_key_values.", "input.past_key_values.")


def graph_feeds(
    session: Any,
    step: Sequence[int],
    length: int,
    past: Mapping[str, np.ndarray[Any, Any]],
) -> dict[str, np.ndarray[Any, Any]]:
    """Feeds of one pass.

    Args:
        session: The session, which knows the inputs.
        step: The tokens of this pass.
        length: Tokens so far, those of this pass included.
        past: Keys and values of the tokens before; empty for none.
    """
    import numpy as np

    feeds: dict[str, np.ndarray[Any, Any]] = {}
    for given in session.get_inputs():
        if given.name == "input_ids":
            feeds[given.name] = np.asarray([step], np.int64)
        elif given.name == "attention_mask":
            feeds[given.name] = np.ones((1, length), np.int64)
        elif given.name == "position_ids":
            feeds[given.name] = np.arange(length - len(step), length, dtype=np.int64)[None]
        else:
            kind = np.float16 if "float16" in given.type else np.float32
            width = given.shape[3] if isinstance(given.shape[3], int) else _HEAD_WIDTH
            none = np.zeros((1, given.shape[1], 0, width), kind)
            feeds[given.name] = past.get(given.name, none)
    return feeds


def genai_generate(folder: Path, ids: Sequence[int], end: int) -> tuple[int, ...]:
    """The tokens that onnxruntime-genai says greedily; `folder` holds its configuration too."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(ids) + NEW_TOKENS, batch_size=1)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(list(ids))
    said: list[int] = []
    while not generator.is_done() and len(said) < NEW_TOKENS and (not said or said[-1] != end):
        generator.generate_next_token()
        said.append(int(generator.get_next_tokens()[0]))
    return tuple(said)


def _load(base: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def _export_with_past(model: PreTrainedModel, out: Path, *, fused: bool) -> None:
    import torch
    from transformers import DynamicCache
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    inputs = token_inputs()
    config = model.config
    past = DynamicCache(config=config)
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        empty = torch.zeros(2, heads, _PAST, width)
        past.update(empty, empty.clone(), layer)
    length = inputs["input_ids"].shape[1] + _PAST
    inputs["attention_mask"] = torch.ones(2, length, dtype=torch.int64)
    dynamic = torch.export.Dim.DYNAMIC
    shapes: dict[str, Any] = {name: {0: dynamic, 1: dynamic} for name in inputs}
    shapes["past_key_values"] = [{0: dynamic, 2: dynamic}] * (2 * config.num_hidden_layers)
    options = OnnxConfig(dynamic_shapes=shapes, ort_fusions="cpu" if fused else None)
    with _quiet():
        exported = OnnxExporter().export(model, {**inputs, "past_key_values": past}, config=options)
        exported.save_pretrained(out)


def _build_genai(base: Path, precision: str, out: Path) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(base)]
    command += ["-o", str(out), "-p", precision, "-e", "cpu", "-c", str(out / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    cached = out / "cache"
    if cached.is_dir() and not any(cached.iterdir()):
        cached.rmdir()
    assert json.loads((out / "genai_config.json").read_text())["model"]


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporters print what they are doing."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
