"""The commands that are disturbed: inputs, command line, and what is there before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from boneconv.cli import run
from tests.builders import BF16, F32, block_for, blocks_for_all, grid, make_adapter, make_base

__all__ = ["ONNX", "SCENARIOS", "Scenario", "make_inputs"]


@dataclass(frozen=True)
class Scenario:
    """A command.

    Attributes:
        name: What it is called in reports.
        arguments: The command line; ``{inputs}`` stands for the folder of `make_inputs`.
        outputs: What it makes in the folder that it is run in.
        before: Makes what lies there already.
        loads: Large modules that it imports.
    """

    name: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...] = ("out",)
    before: Callable[[Path], None] = field(default=lambda folder: None)
    loads: tuple[str, ...] = ()


def make_inputs(folder: Path, *, graph: bool) -> None:
    """A base of three shards and as one file, adapters, a delta file, and a graph."""
    make_base(folder / "base", shards=3, files={"tokenizer.json": "{}", "sub/x.py": "x = 1"})
    make_base(folder / "single")
    make_adapter(folder / "adapter")
    make_adapter(folder / "bat", "bat", files={"tokenizer_config.json": "{}"})
    make_adapter(folder / "other", blocks=blocks_for_all(seed=99))
    large = (1024, 1024)  # enough to be written past the page cache
    make_base(folder / "large", {"a.weight": grid(large, BF16), "b.weight": grid(large, BF16, 2)})
    make_adapter(folder / "wide", blocks={"a": block_for("bone", large)})
    merge = ["merge", str(folder / "base"), str(folder / "bat"), str(folder / "merged")]
    _must(run([*merge, "--workers", "1", "--quiet", "--keep-delta", str(folder / "delta")]))
    if graph:
        from tests.graphs.onnx_files import make_graph
        from tests.onnx.patching.cases import float_tensors, graph_weights

        held = graph_weights(float_tensors(), F32)
        make_graph(folder / "graph" / "model.onnx", held, "external")


def _must(code: int) -> None:
    assert code == 0


def _old_folder(folder: Path) -> None:
    (folder / "out" / "sub").mkdir(parents=True)
    (folder / "out" / "model.safetensors").write_bytes(b"the old model")
    (folder / "out" / "sub" / "notes.txt").write_text("old")


def _old_file(folder: Path) -> None:
    (folder / "out.safetensors").write_bytes(b"the old model")
    (folder / "out.safetensors.boneconv.json").write_text("the old record")


def _merge(
    *rest: str,
    workers: int = 1,
    base: str = "base",
    adapter: str = "adapter",
    out: str = "out",
) -> tuple[str, ...]:
    inputs = (f"{{inputs}}/{base}", f"{{inputs}}/{adapter}")
    return ("merge", *inputs, out, "--workers", str(workers), "--quiet", *rest)


ONNX = ("onnx", "onnxruntime")
_FILE = ("out.safetensors", "out.safetensors.boneconv.json")
_QUIET_ONE = ("-q", "--workers", "1")
_WITH_BASE = ("--base", "{inputs}/base", "-q")
_WITH_GRAPH = ("--graph", "{inputs}/graph", "-q")
_SINGLE = "single/model.safetensors"

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("merge", _merge()),
        Scenario("merge, 2 workers", _merge(workers=2)),
        Scenario("merge of large tensors", _merge(base="large", adapter="wide")),
        Scenario("merge --force", _merge("--force"), before=_old_folder),
        Scenario("merge of a file", _merge(base=_SINGLE, out=_FILE[0]), _FILE),
        Scenario(
            "merge --force of a file",
            _merge("--force", base=_SINGLE, out=_FILE[0]),
            _FILE,
            _old_file,
        ),
        Scenario(
            "merge --each", _merge("--each", "{inputs}/bat=second", workers=2), ("out", "second")
        ),
        Scenario("merge --keep-delta", _merge("--keep-delta", "kept.delta"), ("kept.delta", "out")),
        Scenario(
            "unmerge --delta",
            (
                "unmerge",
                "{inputs}/merged",
                "{inputs}/bat",
                "out",
                "--delta",
                "{inputs}/delta",
                *_QUIET_ONE,
            ),
        ),
        Scenario("convert to native", ("convert", "{inputs}/bat", "out", "--to", "native", "-q")),
        Scenario(
            "convert to a LoRA",
            ("convert", "{inputs}/adapter", "out", "--to", "peft-lora", *_WITH_BASE),
        ),
        Scenario(
            "convert to RWKV's .pth",
            ("convert", "{inputs}/adapter", "out.pth", "--to", "rwkv", "-q"),
            ("out.pth", "out.pth.boneconv.json"),
            loads=("torch",),
        ),
        Scenario(
            "export-onnx --graph",
            ("export-onnx", "{inputs}/base", "{inputs}/adapter", "out", *_WITH_GRAPH),
            loads=ONNX,
        ),
    )
}
