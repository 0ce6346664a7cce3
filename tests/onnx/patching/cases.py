"""A tiny base, its graph written by hand, an adapter, and what must come out of patching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boneconv.io.checkpoint import open_checkpoint
from boneconv.onnx import by_patch, child
from tests.builders import (
    EMBEDDING,
    Array,
    base_tensors,
    blocks_for_all,
    make_adapter,
    make_base,
    merged,
)
from tests.graphs.onnx_files import Storage, make_graph, weights_of

TURNED = "down_proj"


@dataclass(frozen=True)
class Case:
    """Where the inputs lie."""

    base: Path
    adapter: Path
    graph: Path


@pytest.fixture
def check_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lets exports hold graphs against ONNX and ONNX Runtime in this process: that is faster."""

    def accept(path: Path, *, load: bool = True) -> None:
        child.main(str(path), "load" if load else "")
        assert capsys.readouterr().out == '""\n'

    monkeypatch.setattr(by_patch, "accept_in_child", accept)


def float_tensors(seed: int = 0) -> dict[str, Array]:
    """The floating tensors of the tiny base."""
    return {
        name: tensor
        for name, tensor in base_tensors(seed=seed).items()
        if isinstance(tensor, np.ndarray) and tensor.dtype.kind != "i"
    }


def graph_weights(tensors: Mapping[str, Array], dtype: Any) -> dict[str, Array]:
    """The tensors as an exporter would hold them: rounded, one kind of them transposed."""
    return {
        name: tensor.astype(dtype).T if TURNED in name else tensor.astype(dtype)
        for name, tensor in tensors.items()
    }


def make_case(
    tmp_path: Path,
    variant: str = "bone",
    *,
    dtype: Any = np.float32,
    storage: Storage = "external",
    weights: Mapping[str, Array] | None = None,
    **adapter: Any,
) -> Case:
    """A base, an adapter of a variant, and a graph; `adapter` goes to `make_adapter`."""
    base = make_base(tmp_path / "base", files={"tokenizer.json": "{}", "README.md": "the base's"})
    held = graph_weights(float_tensors(), dtype) if weights is None else weights
    return Case(
        base,
        make_adapter(tmp_path / "adapter", variant, **adapter),
        make_graph(tmp_path / "graph" / "model.onnx", held, storage),
    )


def expected(dtype: Any, variant: str = "bone") -> dict[str, Array]:
    """The weights of the patched graph: merged in float64, rounded once to the graph's dtype."""
    tensors = float_tensors()
    blocks = blocks_for_all(variant)
    found = {
        name: merged(tensor, blocks[module], variant, dtype=dtype)
        if (module := name.removesuffix(".weight")) in blocks
        else tensor.astype(dtype)
        for name, tensor in tensors.items()
    }
    assert EMBEDDING in found
    return {name: array.T if TURNED in name else array for name, array in found.items()}


def same_weights(file: Path, wanted: Mapping[str, Array]) -> bool:
    """Whether a graph holds exactly these weights, by ONNX's own loader."""
    held = weights_of(file)
    return held.keys() == wanted.keys() and all(
        held[name].dtype == array.dtype and held[name].tobytes() == array.tobytes()
        for name, array in wanted.items()
    )


def base_tensor(case: Case, name: str) -> Array:
    """A tensor of the base."""
    return open_checkpoint(case.base).tensors[name].read()
