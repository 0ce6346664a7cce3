"""A folder for onnxruntime-genai, made from a merged checkpoint by that library's own builder.

The builder writes the graph layer by layer from the weights, without tracing, with operators of
ONNX Runtime's own. It prints, changes the import path and keeps its copies of the weights, so it
runs as a process of its own, offline.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from boneconv.dtypes import FLOATS
from boneconv.errors import CheckFailedError, InputError, UsageError, printable
from boneconv.graphs import find_weights, open_graph
from boneconv.io.checkpoint import Checkpoint, open_checkpoint
from boneconv.onnx.tracing.weight_bytes import weight_bytes
from boneconv.pretrained import require_libraries

__all__ = ["GenaiSummary", "build_genai"]

_BUILDER = "onnxruntime_genai.models.builder"
_CONFIG = "genai_config.json"
#: Our dtype -> the builder's precision and the provider that it makes such graphs for.
_KINDS = {"float32": ("fp32", "cpu"), "float16": ("fp16", "cuda"), "bfloat16": ("bf16", "cuda")}

#: Two tokens of any vocabulary, to see that the graph runs.
_PROMPT = [0, 1]

#: Peak memory of the builder: what the libraries take, and how often the weights are in memory.
_FIXED, _TIMES = 800 * 10**6, 1.0


@dataclass(frozen=True)
class GenaiSummary:
    """What the builder made.

    Attributes:
        folder: The folder that onnxruntime-genai loads.
        dtype: Dtype of the graph's weights.
        provider: The execution provider that it is made for.
        builder: The library and its version.
        matrices: How many weight matrices of the checkpoint stand in the graph, as they are,
            transposed or packed.
        predicted_memory: Bytes that were predicted beforehand.
        notes: What the user should know.
    """

    folder: Path
    dtype: str
    provider: str
    builder: str
    matrices: int
    predicted_memory: int
    notes: tuple[str, ...]


def build_genai(
    merged: Path,
    target: Path,
    *,
    dtype: str | None = None,
    note: Callable[[str], None] | None = None,
) -> GenaiSummary:
    """Makes a folder that onnxruntime-genai loads.

    Args:
        merged: A folder of safetensors weights with config.json and a tokenizer.
        target: An empty folder.
        dtype: ``float32`` (the default; for the CPU), ``float16`` or ``bfloat16`` (for CUDA).
        note: Is told the memory that it needs, before it begins, and every remark.

    Raises:
        MissingExtraError: onnxruntime-genai or transformers is not installed.
        UsageError: There is no such dtype.
        InputError: The builder does not take the model.
        CheckFailedError: The runtime does not load or run what was built.
    """
    libraries = ("onnxruntime_genai", "transformers")
    require_libraries(libraries, "a folder for onnxruntime-genai", "genai")
    dtype = dtype or "float32"
    if dtype not in _KINDS:
        raise UsageError("no dtype of such a graph", expected=", ".join(_KINDS), found=repr(dtype))
    checkpoint = open_checkpoint(merged)
    notes: list[str] = []

    def remark(text: str) -> None:
        notes.append(text)
        if note is not None:
            note(text)

    predicted = int(_FIXED + _TIMES * weight_bytes(checkpoint, dtype))
    if note is not None:
        note(f"building needs about {predicted / 1e9:.1f} GB of memory")
    precision, provider = _KINDS[dtype]
    _run_builder(merged, target, precision, provider)
    if provider == "cpu":
        _try(target)
    else:
        remark(f"{dtype} graphs are for {provider} and were not tried here")
    return GenaiSummary(
        folder=target,
        dtype=dtype,
        provider=provider,
        builder=f"onnxruntime-genai {version('onnxruntime-genai')}",
        matrices=_count_matrices(target, checkpoint, remark),
        predicted_memory=predicted,
        notes=tuple(notes),
    )


def _run_builder(merged: Path, target: Path, precision: str, provider: str) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".genai-") as cache:
        command = [sys.executable, "-m", _BUILDER, "-i", str(merged.resolve())]
        command += ["-o", str(target.resolve()), "-p", precision, "-e", provider, "-c", cache]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=offline, check=False
        )
    if done.returncode != 0 or not (target / _CONFIG).is_file():
        raise InputError(
            f"onnxruntime-genai's builder does not take this model: {_reason(done)}",
            path=merged,
            hint="Leave out --runtime genai to trace it for ONNX Runtime",
        )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a process left."""
    if done.returncode < 0:
        return f"it was killed by signal {-done.returncode}"
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return printable(lines[-1])[:400] if lines else f"it ended with {done.returncode}"


def _try(folder: Path) -> None:
    """Has the runtime load the folder and say one token."""
    runtime = import_module("onnxruntime_genai")
    try:
        model = runtime.Model(str(folder))
        parameters = runtime.GeneratorParams(model)
        parameters.set_search_options(max_length=len(_PROMPT) + 1, batch_size=1)
        generator = runtime.Generator(model, parameters)
        generator.append_tokens(_PROMPT)
        generator.generate_next_token()
    except Exception as error:
        raise CheckFailedError(
            f"onnxruntime-genai does not run what was built: {printable(str(error))[:400]}",
            path=folder,
            hint="Leave out --runtime genai to trace it for ONNX Runtime",
        ) from error


def _count_matrices(folder: Path, checkpoint: Checkpoint, remark: Callable[[str], None]) -> int:
    """How many matrices of the checkpoint the graph holds; says which it does not."""
    matrices = [
        name
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) == 2 and tensor.dtype in FLOATS
    ]
    places = find_weights(open_graph(folder), checkpoint.tensors, matrices)
    changed = [name for name in matrices if not places[name]]
    if changed:
        remark(
            f"the builder changed the values of {len(changed)} of {len(matrices)} matrices, "
            f"{changed[0]!r} first; compare its answers with --verify"
        )
    return len(matrices) - len(changed)
