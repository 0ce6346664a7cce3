"""One graph, the base and several adapters: every answer is PEFT's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

import boneconv
from boneconv.errors import FormatError, NameMatchError, UsageError
from boneconv.formats import read_adapter
from boneconv.io.checkpoint import open_checkpoint
from boneconv.onnx.runtime.export import (
    RuntimeSummary,
    add_adapter,
    export_runtime_adapters,
)
from boneconv.onnx.runtime.session import AdapterSession
from boneconv.planning.accounts import Strength
from tests.builders import Array, grid, make_adapter, snapshot
from tests.conftest import TinyCase
from tests.oracle import real, tiny
from tests.oracle.graphs import export_graph, graph_outputs, smollm2_graph

NEAR = {"rtol": 0, "atol": 2e-5}
#: Adapter -> its variant and rank; 12 divides neither 32 nor 64.
ADAPTERS: Mapping[str, tuple[tiny.Variant, int]] = {
    "even": ("bone", 8),
    "ragged": ("bone", 12),
    "mini": ("mini", 8),
    "bat": ("bat", 8),
}


@dataclass(frozen=True)
class Model:
    """A tiny base, its graph, and adapters for it."""

    graph: Path
    cases: Mapping[str, tiny.Case]

    @property
    def base(self) -> Path:
        return self.cases["even"].base

    def export(
        self, out: Path, *names: str, scale: float = 1.0, **options: object
    ) -> RuntimeSummary:
        out.mkdir()
        adapters = {name: strength(self.cases[name].adapter, scale) for name in names}
        return export_runtime_adapters(
            open_checkpoint(self.base), adapters, self.graph, out, **options
        )

    def feeds(self) -> dict[str, Array]:
        return {name: tensor.numpy() for name, tensor in self.cases["even"].inputs().items()}

    def expected(self, name: str | None) -> Array:
        if name is None:
            return tiny.base_logits(self.cases["even"]).numpy()
        return tiny.peft_logits(self.cases[name]).numpy()


def strength(adapter: Path, scale: float = 1.0) -> Strength:
    return Strength(read_adapter(adapter), scale)


def make_model(name: str, tiny_case: TinyCase, folder: Path, *, external: bool) -> Model:
    cases = {
        adapter: tiny_case(name, variant=variant, rank=rank)
        for adapter, (variant, rank) in ADAPTERS.items()
    }
    case = cases["even"]
    base = case.load(case.base)
    return Model(export_graph(base, case.inputs(), folder, optimize=True, external=external), cases)


@pytest.fixture(scope="module")
def llama(tiny_case: TinyCase, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Its graph holds the weights inline."""
    return make_model("llama-tied", tiny_case, tmp_path_factory.mktemp("llama"), external=False)


@pytest.fixture(scope="module")
def neox(tiny_case: TinyCase, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Its layers have biases; the weights lie in a file of their own."""
    return make_model("gpt-neox", tiny_case, tmp_path_factory.mktemp("neox"), external=True)


@pytest.fixture(params=["llama", pytest.param("neox", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> Model:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Model)
    return found


def test_base_and_adapters_answer_as_peft_does(model: Model, tmp_path: Path) -> None:
    names = ("even", "ragged", "mini")
    summary = model.export(tmp_path / "out", *names)
    assert set(summary.adapters) == set(names)
    session = AdapterSession(summary.graph)
    for name in names:
        session.load(name, summary.adapters[name])
    expected = {name: model.expected(name) for name in (None, *names)}
    assert np.abs(expected["even"] - expected["ragged"]).max() > 0.1
    for name in (None, *names, None):
        (found,) = session.run(None, model.feeds(), name)
        np.testing.assert_allclose(found, expected[name], **NEAR)


def test_without_an_adapter_the_base_answers_to_the_bit(model: Model, tmp_path: Path) -> None:
    summary = model.export(tmp_path / "out", "even")
    (found,) = AdapterSession(summary.graph).run(None, model.feeds())
    base = graph_outputs(model.graph, model.cases["even"].inputs())[0]
    np.testing.assert_array_equal(found, base)


def test_bat_in_its_activation_form_beside_bone(model: Model, tmp_path: Path) -> None:
    notes: list[str] = []
    summary = model.export(tmp_path / "out", "bat", "ragged", bat="activation", note=notes.append)
    assert any("activation form" in note and "times as long" in note for note in notes)
    session = AdapterSession(summary.graph)
    for name, path in summary.adapters.items():
        session.load(name, path)
    for name in ("bat", "ragged", None, "bat"):
        (found,) = session.run(None, model.feeds(), name)
        np.testing.assert_allclose(found, model.expected(name), **NEAR)


def test_the_files_that_are_written(llama: Model, tmp_path: Path) -> None:
    before = snapshot(llama.graph.parent), snapshot(llama.base)
    summary = llama.export(tmp_path / "out", "even")
    assert set(snapshot(tmp_path / "out")) == {
        "adapters/even.onnx_adapter",
        "model.onnx",
        "model.onnx.data",
    }
    assert summary.graph == tmp_path / "out" / "model.onnx"
    assert summary.modules == 14
    assert (snapshot(llama.graph.parent), snapshot(llama.base)) == before


def test_the_output_is_the_same_every_time(llama: Model, tmp_path: Path) -> None:
    llama.export(tmp_path / "one", "even")
    llama.export(tmp_path / "two", "even")
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    assert one["model.onnx"] == two["model.onnx"]
    assert one["model.onnx.data"] == two["model.onnx.data"]


def test_the_scale_is_folded_into_the_file(llama: Model, tmp_path: Path) -> None:
    summary = llama.export(tmp_path / "out", "even", scale=0.5)
    session = AdapterSession(summary.graph)
    session.load("half", summary.adapters["even"])
    boneconv.merge(llama.base, llama.cases["even"].adapter, tmp_path / "merged", scale=0.5)
    case = llama.cases["even"]
    expected = tiny.logits(case.load(tmp_path / "merged"), case.inputs()).numpy()
    np.testing.assert_allclose(session.run(None, llama.feeds(), "half")[0], expected, **NEAR)


def test_one_more_adapter_for_a_graph_that_exists(
    llama: Model, tiny_case: TinyCase, tmp_path: Path
) -> None:
    summary = llama.export(tmp_path / "out", "even")
    late = tiny_case("llama-tied", rank=12)
    path = tmp_path / "late.onnx_adapter"
    add_adapter(open_checkpoint(llama.base), strength(late.adapter), summary.graph, path)
    session = AdapterSession(summary.graph)
    session.load("late", path)
    (found,) = session.run(None, llama.feeds(), "late")
    np.testing.assert_allclose(found, tiny.peft_logits(late).numpy(), **NEAR)
    with pytest.raises(NameMatchError, match="have no input in the graph"):
        bat = strength(llama.cases["bat"].adapter)
        add_adapter(open_checkpoint(llama.base), bat, summary.graph, tmp_path / "bat")
    with pytest.raises(FormatError, match="no inputs for adapters"):
        add_adapter(open_checkpoint(llama.base), strength(late.adapter), llama.graph, path)


def test_a_tied_head_is_adapted_and_its_embedding_is_not(llama: Model, tmp_path: Path) -> None:
    block = 0.05 * grid((12, 128))
    adapter = make_adapter(
        tmp_path / "adapter", rank=12, blocks={"lm_head": block}, target_modules=["lm_head"]
    )
    (tmp_path / "out").mkdir()
    notes: list[str] = []
    summary = export_runtime_adapters(
        open_checkpoint(llama.base),
        {"head": strength(adapter)},
        llama.graph,
        tmp_path / "out",
        note=notes.append,
    )
    session = AdapterSession(summary.graph)
    session.load("head", summary.adapters["head"])
    boneconv.merge(llama.base, adapter, tmp_path / "merged")
    case = llama.cases["even"]
    expected = tiny.logits(case.load(tmp_path / "merged"), case.inputs()).numpy()
    (found,) = session.run(None, llama.feeds(), "head")
    np.testing.assert_allclose(found, expected, **NEAR)
    (base,) = session.run(None, llama.feeds())
    np.testing.assert_allclose(base, llama.expected(None), **NEAR)


# --- refused ----------------------------------------------------------------------------------


def test_bat_is_refused_unless_it_is_asked_for(llama: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"BAT cannot be swapped.*leave out --runtime-adapters"):
        llama.export(tmp_path / "out", "even", "bat")
    assert not list((tmp_path / "out").iterdir())


def test_bat_has_one_rank_in_a_graph(llama: Model, tiny_case: TinyCase, tmp_path: Path) -> None:
    other = tiny_case("llama-tied", variant="bat", rank=4)
    two = Model(llama.graph, {**llama.cases, "other": other})
    with pytest.raises(UsageError, match=r"several ranks in .*\[4, 8\]"):
        two.export(tmp_path / "out", "bat", "other", bat="activation")


@pytest.mark.parametrize("name", ["llama-lm-head", "llama-embedding", "vit"])
def test_saved_tensors_cannot_be_swapped(
    llama: Model, tiny_case: TinyCase, tmp_path: Path, name: str
) -> None:
    case = tiny_case(name)
    with pytest.raises(UsageError, match=r"cannot be swapped.*leave out --runtime-adapters"):
        export_runtime_adapters(
            open_checkpoint(case.base), {"a": strength(case.adapter)}, llama.graph, tmp_path
        )
    assert not list(tmp_path.iterdir())


def test_a_graph_of_another_base_is_refused(llama: Model, tmp_path: Path) -> None:
    adapter = llama.cases["even"].adapter
    boneconv.merge(llama.base, adapter, tmp_path / "merged")
    (tmp_path / "out").mkdir()
    merged = open_checkpoint(tmp_path / "merged")
    with pytest.raises(NameMatchError, match=r"lacks 14 of the 14 weights.*model\.layers\.0"):
        export_runtime_adapters(merged, {"a": strength(adapter)}, llama.graph, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_quantised_graph_is_refused(llama: Model, tmp_path: Path) -> None:
    model = onnx.load(llama.graph)
    model.graph.node[0].op_type = "DynamicQuantizeLinear"
    onnx.save(model, tmp_path / "quantised.onnx")
    quantised = Model(tmp_path / "quantised.onnx", llama.cases)
    with pytest.raises(FormatError, match="quantised"):
        quantised.export(tmp_path / "out", "even")


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a b", ".hidden", "a\n"])
def test_names_that_are_no_file_names_are_refused(llama: Model, tmp_path: Path, name: str) -> None:
    adapters = {name: strength(llama.cases["even"].adapter)}
    with pytest.raises(UsageError, match="file names"):
        export_runtime_adapters(open_checkpoint(llama.base), adapters, llama.graph, tmp_path)


def test_no_adapter_or_two_of_one_name_are_refused(llama: Model, tmp_path: Path) -> None:
    base, one = open_checkpoint(llama.base), strength(llama.cases["even"].adapter)
    with pytest.raises(UsageError, match="no adapter"):
        export_runtime_adapters(base, {}, llama.graph, tmp_path)
    with pytest.raises(UsageError, match="one name"):
        export_runtime_adapters(base, {"a": one, "A": one}, llama.graph, tmp_path)


# --- SmolLM2 ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exporter", "exporter-fused", "genai-fp32"])
def test_smollm2_with_three_adapters(
    cache: Path, real_base: Path, trained_bone: Path, tmp_path: Path, kind: str
) -> None:
    """The trained adapter, half of it and a ragged one of r = 50, within float32 noise of torch."""
    import torch

    ragged = cut_to_rank(trained_bone, tmp_path / "ragged", 50)
    adapters = {
        "trained": strength(trained_bone),
        "half": strength(trained_bone, 0.5),
        "ragged": strength(ragged),
    }
    (tmp_path / "out").mkdir()
    summary = export_runtime_adapters(
        open_checkpoint(real_base), adapters, smollm2_graph(cache, kind), tmp_path / "out"
    )
    session = AdapterSession(summary.graph)
    ids = [*real.prompt(real_base), *real.answer(real_base)]
    inputs = torch.tensor([ids])
    feeds = first_pass(session, ids)
    for name, path in summary.adapters.items():
        session.load(name, path)
    for name in ("trained", None, "ragged", "half"):
        found = session.run(["logits"], feeds, name)[0]
        with torch.no_grad():
            torch_model = as_torch(real_base, trained_bone, ragged, name)
            expected = torch_model(input_ids=inputs, use_cache=False).logits.numpy()
        assert np.abs(expected).max() > 20
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4)


@pytest.mark.slow
def test_onnxruntime_genai_swaps_the_same_files(
    cache: Path, real_base: Path, trained_bone: Path, tmp_path: Path
) -> None:
    import onnxruntime_genai as genai

    folder = smollm2_graph(cache, "genai-fp32")
    (tmp_path / "out").mkdir()
    summary = export_runtime_adapters(
        open_checkpoint(real_base), {"bone": strength(trained_bone)}, folder, tmp_path / "out"
    )
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("model.onnx"):
            shutil.copy(path, tmp_path / "out")
    model = genai.Model(str(tmp_path / "out"))
    adapters = genai.Adapters(model)
    adapters.load(str(summary.adapters["bone"]), "bone")
    expected = real.reference(cache, "bone")
    ids = real.prompt(real_base)

    def said(adapter: str | None) -> list[int]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(ids) + 64, batch_size=1)
        generator = genai.Generator(model, parameters)
        if adapter is not None:
            generator.set_active_adapter(adapters, adapter)
        generator.append_tokens(ids)
        tokens: list[int] = []
        while not generator.is_done() and len(tokens) < len(expected.tokens):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return tokens

    assert expected.agrees(tuple(said("bone")))
    assert not expected.agrees(tuple(said(None)))


def cut_to_rank(adapter: Path, out: Path, rank: int) -> Path:
    """The first rows of every block of an adapter, as an adapter of that rank."""
    read = read_adapter(adapter)
    blocks = {name: block.tensor.read()[:rank] for name, block in read.blocks.items()}
    targets = sorted({name.rpartition(".")[2] for name in blocks})
    return make_adapter(
        out, rank=rank, blocks=blocks, target_modules=targets, task_type="CAUSAL_LM"
    )


def as_torch(base: Path, trained: Path, ragged: Path, name: str | None) -> object:
    """The base in torch with an adapter attached by PEFT; half of one is half of its blocks."""
    if name is None:
        return real.load_smollm2(base, "float32")
    model = real.attached(base, ragged if name == "ragged" else trained)
    if name == "half":
        for parameter_name, parameter in model.named_parameters():
            if "bone_block" in parameter_name:
                parameter.data *= 0.5
    return model


def first_pass(session: AdapterSession, ids: list[int]) -> dict[str, Array]:
    """Feeds of a whole text with an empty past."""
    feeds: dict[str, Array] = {}
    for given in session.session.get_inputs():
        if given.name == "input_ids":
            feeds[given.name] = np.asarray([ids], np.int64)
        elif given.name == "attention_mask":
            feeds[given.name] = np.ones((1, len(ids)), np.int64)
        elif given.name == "position_ids":
            feeds[given.name] = np.arange(len(ids), dtype=np.int64)[None]
        else:
            feeds[given.name] = np.zeros((1, 3, 0, 64), np.float32)
    return feeds
