"""Traced graphs of tiny models: what they take and give, at every size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from boneconv import merge
from boneconv.onnx.tracing.trace import TraceSummary, trace_graph
from tests.conftest import TinyCase
from tests.oracle.graphs import graph_session
from tests.oracle.tiny import Case

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The largest difference between two float32 runtimes, as a part of the largest value.
NOISE = 2e-6

Feeds = dict[str, "np.ndarray[Any, Any]"]


@dataclass
class Traced:
    """A merged tiny model and its graph."""

    case: Case
    summary: TraceSummary
    said: list[str]
    model: PreTrainedModel
    session: Any

    def run(self, feeds: Feeds) -> Feeds:
        """The graph's outputs by name."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(None, feeds), strict=True))

    def torch(self, **inputs: Any) -> Any:
        """The model's outputs to the same arrays."""
        import torch

        given = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
        with torch.no_grad():
            return self.model(**given)


Make = Callable[[str], Traced]


@pytest.fixture(scope="module")
def traced(tiny_case: TinyCase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Merges and traces a tiny model, once."""
    made: dict[str, Traced] = {}

    def make(name: str) -> Traced:
        if name not in made:
            case = tiny_case(name)
            root = tmp_path_factory.mktemp(name)
            merge(case.base, case.adapter, root / "merged", dtype="float32", workers=1)
            out = root / "out"
            out.mkdir()
            said: list[str] = []
            summary = trace_graph(root / "merged", out, note=said.append)
            made[name] = Traced(
                case, summary, said, case.load(root / "merged"), graph_session(summary.graph)
            )
        return made[name]

    yield make
    made.clear()


def close(found: np.ndarray[Any, Any], wanted: Any) -> bool:
    """Whether two runtimes say the same, but for float32's noise."""
    reference = wanted.numpy()
    assert found.shape == reference.shape
    return float(np.abs(found - reference).max()) <= NOISE * float(np.abs(reference).max())


def tokens(batch: int, length: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([batch, length]).integers(5, 128, (batch, length))


def empty_past(traced: Traced, batch: int) -> Feeds:
    return {
        given.name: np.zeros((batch, given.shape[1], 0, given.shape[3]), np.float32)
        for given in traced.session.get_inputs()
        if given.name.startswith("past_key_values")
    }


def passes(traced: Traced, ids: np.ndarray[Any, Any], past: Feeds, before: int) -> Feeds:
    """One pass of a graph over tokens that follow `before` others."""
    batch, length = ids.shape
    positions = np.arange(before, before + length)[None].repeat(batch, 0)
    feeds = {"input_ids": ids, "attention_mask": np.ones((batch, before + length), np.int64)}
    return traced.run({**feeds, "position_ids": positions, **past})


def as_past(outputs: Feeds) -> Feeds:
    return {
        name.replace("present", "past_key_values"): value
        for name, value in outputs.items()
        if name.startswith("present")
    }


#: Tracing takes seconds each; the slow ones are traced too, by `pytest -m slow`.
DECODERS = [
    "llama-tied",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("gpt-neox", "qwen2", "opt", "mixtral")
    ),
]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "vit")]
#: Those whose keys and values have fewer heads than their queries have 2, the others 4.
GROUPED = ("llama-tied", "qwen2", "mixtral")


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_named_as_the_ecosystem_names_it(traced: Make, name: str) -> None:
    graph = traced(name)
    layers = [f"{n}.{part}" for n in range(2) for part in ("key", "value")]
    inputs = {given.name: given.shape for given in graph.session.get_inputs()}
    outputs = {given.name: given.shape for given in graph.session.get_outputs()}
    heads = 2 if name in GROUPED else 4
    assert inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{
            f"past_key_values.{layer}": ["batch_size", heads, "past_sequence_length", 8]
            for layer in layers
        },
    }
    assert outputs == {
        "logits": ["batch_size", "sequence_length", 128],
        **{
            f"present.{layer}": ["batch_size", heads, "total_sequence_length", 8]
            for layer in layers
        },
    }
    assert list(inputs)[3:] == [f"past_key_values.{layer}" for layer in layers]
    assert graph.summary.task == "text-generation-with-past"
    assert "OnnxExporter" in graph.summary.exporter


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 9), (3, 1), (3, 9), (2, 7)])
def test_a_decoder_reads_a_prompt_of_any_size(
    traced: Make, name: str, batch: int, length: int
) -> None:
    graph = traced(name)
    ids = tokens(batch, length)
    outputs = passes(graph, ids, empty_past(graph, batch), 0)
    wanted = graph.torch(input_ids=ids)
    assert close(outputs["logits"], wanted.logits)
    for number, layer in enumerate(wanted.past_key_values.layers):
        assert close(outputs[f"present.{number}.key"], layer.keys)
        assert close(outputs[f"present.{number}.value"], layer.values)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(("batch", "before", "length"), [(1, 1, 1), (3, 40, 1), (1, 40, 9)])
def test_a_decoder_goes_on_from_any_past(
    traced: Make, name: str, batch: int, before: int, length: int
) -> None:
    graph = traced(name)
    ids = tokens(batch, before + length)
    first = passes(graph, ids[:, :before], empty_past(graph, batch), 0)
    second = passes(graph, ids[:, before:], as_past(first), before)
    wanted = graph.torch(input_ids=ids)
    assert close(second["logits"], wanted.logits[:, before:])
    assert second["present.0.key"].shape[2] == before + length


def test_a_decoder_looks_past_padding_on_the_left(traced: Make) -> None:
    graph = traced("llama-tied")
    ids = tokens(2, 6)
    mask = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]])
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    found = graph.run(
        {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            **empty_past(graph, 2),
        }
    )["logits"]
    assert close(found[1:, 2:], graph.torch(input_ids=ids[1:, 2:]).logits)
    assert close(found[:1], graph.torch(input_ids=ids[:1]).logits)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 9), (3, 1), (3, 40)])
def test_a_classifier_reads_texts_of_any_size(traced: Make, batch: int, length: int) -> None:
    graph = traced("bert")
    feeds = {
        "input_ids": tokens(batch, length),
        "attention_mask": np.ones((batch, length), np.int64),
        "token_type_ids": np.arange(batch * length).reshape(batch, length) % 2,
    }
    assert close(graph.run(feeds)["logits"], graph.torch(**feeds).logits)


@pytest.mark.slow
def test_a_classifier_looks_past_padding(traced: Make) -> None:
    graph = traced("bert")
    ids, kinds = tokens(2, 6), np.zeros((2, 6), np.int64)
    mask = np.array([[1] * 6, [1, 1, 1, 0, 0, 0]])
    found = graph.run({"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds})["logits"]
    assert close(found[1:], graph.torch(input_ids=ids[1:, :3]).logits)


@pytest.mark.slow
def test_a_classifier_gives_its_logits_alone(traced: Make) -> None:
    graph = traced("bert")
    assert [(o.name, o.shape) for o in graph.session.get_outputs()] == [
        ("logits", ["batch_size", 3])
    ]
    assert graph.summary.task == "text-classification"
    assert graph.summary.dropped == ()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_an_image_model_reads_batches_of_any_size(traced: Make, batch: int) -> None:
    graph = traced("vit")
    pixels = np.random.default_rng(batch).standard_normal((batch, 3, 16, 16), np.float32)
    (given,) = graph.session.get_inputs()
    assert (given.name, given.shape) == ("pixel_values", ["batch_size", 3, 16, 16])
    assert close(graph.run({"pixel_values": pixels})["logits"], graph.torch(pixel_values=pixels)[0])


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_every_weight_was_found(traced: Make, name: str) -> None:
    """Those of Mixtral's experts as the two matrices that transformers stacks of them a layer."""
    from safetensors import safe_open

    graph = traced(name)
    with safe_open(graph.case.base / "model.safetensors", "np") as file:
        names = [key for key in file.keys() if ".experts." not in key]  # noqa: SIM118
    assert graph.summary.weights == len(names) + (2 * 2 if name == "mixtral" else 0)


@pytest.mark.parametrize("name", ["llama-tied", OTHERS[0]])
def test_memory_is_said_before_anything_else(traced: Make, name: str) -> None:
    assert traced(name).said == ["tracing needs about 0.7 GB of memory"]
    assert traced(name).summary.notes == ()


@pytest.mark.parametrize("name", ["llama-tied", *OTHERS])
def test_the_files_tell_nothing_of_the_machine(traced: Make, name: str) -> None:
    summary = traced(name).summary
    folder = summary.graph.parent
    expected = {"model.onnx", "config.json"}
    if name == "llama-tied":
        expected.add("generation_config.json")
    assert {path.name for path in folder.iterdir()} == expected
    assert summary.data is None
    content = summary.graph.read_bytes()
    for word in (b"site-packages", b".py", str(Path.cwd()).encode()):
        assert word not in content


def test_the_graph_says_which_module_a_node_is_of(traced: Make) -> None:
    from boneconv.graphs import open_graph

    graph = open_graph(traced("llama-tied").summary.graph)
    modules = {use.module for uses in graph.uses.values() for use in uses}
    assert "model.layers.1.mlp.up_proj" in modules
