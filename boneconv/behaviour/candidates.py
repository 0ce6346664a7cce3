"""What is compared with the reference, opened: a checkpoint, a graph, or an adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from boneconv.behaviour import torch_runner
from boneconv.behaviour.loading import Loaded, load_model, quiet
from boneconv.behaviour.measures import Answers
from boneconv.behaviour.onnx_runner import GraphRunner
from boneconv.behaviour.prompts import Question
from boneconv.behaviour.reference import attach
from boneconv.behaviour.widening import widened
from boneconv.config import CONFIG_NAME
from boneconv.dtypes import FLOATS, cli_name
from boneconv.errors import InputError, MissingExtraError, NameMatchError, UsageError, first_line
from boneconv.formats import load_adapter, says_native
from boneconv.graphs import open_graph, refuse_quantised
from boneconv.io.checkpoint import open_checkpoint
from boneconv.names.architecture import architectures
from boneconv.strict_json import read_object

__all__ = ["KINDS", "Candidate", "TorchRunner", "kind_of", "open_candidate"]

KINDS = ("auto", "checkpoint", "onnx", "lora", "adapter")
_HALF = ("F16", "BF16")
_RECORD = "boneconv.json"


class Runner(Protocol):
    """What answers questions."""

    @property
    def name(self) -> str:
        """What runs, with its version."""

    def answers(self, questions: Sequence[Question], output: str) -> Iterator[Answers]:
        """What it gives to each question, ``[positions, width]``."""


@dataclass(frozen=True)
class TorchRunner:
    """A model in torch.

    Attributes:
        model: The model.
    """

    model: Any

    @property
    def name(self) -> str:
        """What runs, with its version."""
        return f"torch {import_module('torch').__version__.split('+')[0]}, float32"

    def answers(self, questions: Sequence[Question], output: str) -> Iterator[Answers]:
        """As `torch_runner.answers`; a base model's output is taken from the model below a head."""
        model = self.model
        if questions and torch_runner.find_output(model, questions[0], (output,)) is None:
            model = model.base_model
        yield from torch_runner.answers(model, questions, output)


@dataclass(frozen=True)
class Candidate:
    """A candidate, before it is loaded.

    Attributes:
        path: Its folder, or the graph's file.
        kind: One of `KINDS`, but ``auto``.
        weights: The dtypes of its floating weights.
        outputs: What a graph gives, of what is known; empty for others, and for a graph whose
            outputs have other names: its first is taken then.
        exact: Whether it claims to be the merge, not an approximation of it.
        runtime_adapter: The ``.onnx_adapter`` file that a graph is run with.
    """

    path: Path
    kind: str
    weights: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    exact: bool = True
    runtime_adapter: Path | None = None

    def half_weights(self, class_name: str) -> dict[str, str]:
        """Which parameters of a class it has in half precision, and in which.

        Args:
            class_name: The reference's class.

        Returns:
            ``bfloat16`` or ``float16`` by the model's names. For a graph, every name maps to the
            dtype that most of its weights have.
        """
        if self.kind == "onnx":
            return {} if self.weights == ("float32",) else _All(self.weights[0])
        if self.kind != "checkpoint":
            return {}
        tensors = open_checkpoint(self.path).tensors
        half = {name for name, tensor in tensors.items() if tensor.dtype in _HALF}
        if not half:
            return {}
        architecture = next(architectures(self.path / "config.json", [class_name]))
        homes = architecture.load(list(tensors))
        found = {
            target: cli_name(tensors[name].dtype) for name in half for target in homes[name].targets
        }
        tied = {
            name: found[source] for name, source in architecture.ties.items() if source in found
        }
        return tied | found

    def load(self, base: Path, class_name: str, scale: float) -> Runner:
        """Loads it, in float32.

        Raises:
            ValueError: It cannot be run, which is a finding and no fault of the input.
            MissingExtraError: PEFT is needed.
        """
        if self.kind == "onnx":
            if self.weights == ("float32",):
                return GraphRunner(self.path, self.runtime_adapter)
            with widened(self.path) as place:
                return GraphRunner(place, computes="float32")
        try:
            folder = self.path if self.kind == "checkpoint" else base
            loaded = load_model(folder, class_name, "float32")
            if loaded is None:
                raise ValueError(f"transformers has no class {class_name}")
            if self.kind == "checkpoint":
                _check_complete(loaded)
                return TorchRunner(loaded.model)
            if self.kind == "lora":
                return TorchRunner(_with_lora(loaded.model, self.path))
            return TorchRunner(attach(loaded.model, [load_adapter(self.path)], scale))
        except MissingExtraError:
            raise
        except InputError as error:
            raise ValueError(error.message) from error


class _All(dict[str, str]):
    """A mapping that has one value for every name."""

    def __init__(self, value: str) -> None:
        super().__init__({"*": value})
        self._value = value

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> str:
        return self._value


def kind_of(path: Path) -> str:
    """What a candidate is, from the names of its files.

    Raises:
        UsageError: It is nothing whose answers can be compared.
    """
    if path.suffix == ".onnx":
        return "onnx"
    if (path / CONFIG_NAME).is_file():
        is_lora = str(read_object(path / CONFIG_NAME).get("peft_type", "")).upper() == "LORA"
        return "lora" if is_lora else "adapter"
    if path.is_dir() and any(path.glob("*.safetensors")):
        return "adapter" if says_native(path) else "checkpoint"
    if path.is_dir() and (any(path.glob("*.onnx")) or any(path.glob("onnx/*.onnx"))):
        return "onnx"
    if path.suffix == ".pth" or (path.suffix == ".safetensors" and says_native(path)):
        return "adapter"
    raise UsageError(
        "logits of this cannot be compared",
        path=path,
        expected="a folder with config.json and weights, an ONNX graph, or an adapter",
    )


def open_candidate(path: Path, kind: str, runtime_adapter: Path | None = None) -> Candidate:
    """Reads what a candidate is, headers only.

    Raises:
        UsageError: It is nothing whose answers can be compared.
        InputError: One of its kinds; the graph or the checkpoint is malformed, or quantised.
    """
    if kind not in KINDS:
        raise UsageError("no such kind of candidate", expected=", ".join(KINDS), found=repr(kind))
    kind = kind_of(path) if kind == "auto" else kind
    if kind == "onnx":
        return _open_graph(path, runtime_adapter)
    if kind != "checkpoint":
        return Candidate(path, kind, ("float32",), exact=_is_exact(path))
    if not (path / "config.json").is_file():
        raise UsageError("comparing logits needs a folder with a config.json", path=path)
    dtypes = {t.dtype for t in open_checkpoint(path).tensors.values() if t.dtype in FLOATS}
    return Candidate(path, kind, tuple(sorted(map(cli_name, dtypes))))


def _open_graph(path: Path, runtime_adapter: Path | None) -> Candidate:
    below = path / "onnx"
    graph = open_graph(below if below.is_dir() and not any(path.glob("*.onnx")) else path)
    refuse_quantised(graph)
    sizes: Counter[str] = Counter()
    for each in graph.initializers.values():
        sizes[each.dtype] += each.nbytes
    most = sizes.most_common(1)[0][0] if sizes else "F32"
    names = tuple(output.name for output in graph.proto.graph.output)
    known = tuple(name for name in names if name in torch_runner.OUTPUTS)
    if runtime_adapter is not None and most != "F32":
        raise UsageError(
            "answers of a graph with adapters apart are compared in float32 alone",
            path=path,
            found=cli_name(most),
        )
    return Candidate(graph.path, "onnx", (cli_name(most),), known, runtime_adapter=runtime_adapter)


def _is_exact(path: Path) -> bool:
    record = path / _RECORD if path.is_dir() else path.with_name(f"{path.name}.{_RECORD}")
    if not record.is_file():
        return True
    error = read_object(record).get("worst_error", 0.0)
    return not (isinstance(error, int | float) and error > 0)


def _check_complete(loaded: Loaded) -> None:
    if loaded.missing:
        names = ", ".join(loaded.missing[:4])
        more = f" and {len(loaded.missing) - 4} more" if len(loaded.missing) > 4 else ""
        raise NameMatchError(f"the candidate lacks weights that the model needs: {names}{more}")


def _with_lora(model: Any, path: Path) -> Any:
    if find_spec("peft") is None:
        raise MissingExtraError(
            "comparing the logits of a LoRA needs peft", hint="Install it with: pip install peft"
        )
    try:
        with quiet():
            return import_module("peft").PeftModel.from_pretrained(model, str(path)).eval()
    except Exception as error:
        raise ValueError(f"PEFT cannot load the LoRA: {first_line(error)}") from error
