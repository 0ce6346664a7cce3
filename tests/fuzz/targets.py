"""The readers that strangers' files reach, and good files for each to begin from.

A target is a reader and some cases: files by name, written to an empty folder before each run. Next
to that folder lie files that a path out of it would find.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import boneconv
from boneconv.behaviour.loading import classes_of
from boneconv.delta.document import Document
from boneconv.delta.read import open_delta
from boneconv.errors import BoneconvError
from boneconv.formats import read_adapter
from boneconv.formats.native.canonical import parse
from boneconv.formats.rwkv import write as write_rwkv
from boneconv.inspection import inspect
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.pipeline import open_pipeline
from boneconv.io.pth import locate_tensors
from boneconv.io.safetensors import StoredTensor, read_header
from boneconv.planning.config_edits import ConfigEdits
from boneconv.strict_json import parse_object
from boneconv.unmerging.records import read_record
from boneconv.validation import validate
from boneconv.verification.candidate import CandidateKind, open_candidate
from tests.builders import (
    F16,
    F32,
    RANK,
    VOCABULARY,
    block_for,
    grid,
    make_adapter,
    make_base,
    pack,
)
from tests.fuzz.mutate import Case

__all__ = ["TARGETS", "Target", "write_case"]

Q, EMBED = "layers.0.q_proj", "embed"
SMALL = 1 << 20


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        name: Its name, that of its folder in the corpus too.
        read: Reads a folder; what it raises is judged by the caller.
        seeds: The good cases.
        cost: How much slower it is than the quickest, roughly: the share of a run is its inverse.
    """

    name: str
    read: Callable[[Path], object]
    seeds: Callable[[], list[Case]]
    cost: int = 1


def write_case(folder: Path, case: Case) -> None:
    """Writes the files of a case; the folder is empty before."""
    for name, content in case.items():
        (folder / name).write_bytes(content)


def _files(folder: Path) -> Case:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@cache
def _made() -> dict[str, Case]:
    """Small files as boneconv and PEFT write them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return dict(_make(folder))


def _make(folder: Path) -> Iterator[tuple[str, Case]]:
    weights = {f"model.{Q}.weight": grid((8, 8), F16), f"model.{EMBED}.weight": grid((4, 8), F16)}
    base = make_base(folder / "base", weights)
    yield "base", _files(base)
    shards = make_base(folder / "shards", weights, shards=2, metadata={"format": "pt"})
    yield "shards", _files(shards)
    for variant in ("bone", "bat", "mini"):
        blocks = {f"model.{Q}": block_for(variant, (8, 8), rank=RANK)}
        saved = {f"model.{EMBED}.weight": grid((4, 8))} if variant == "bone" else None
        adapter = make_adapter(
            folder / variant, variant, blocks=blocks, saved=saved, modules_to_save=[EMBED]
        )
        yield variant, _files(adapter)
        boneconv.convert(adapter, folder / f"{variant}-native", to="native", base=base)
        yield f"{variant}-native", _files(folder / f"{variant}-native")
    delta = folder / "delta"
    boneconv.merge(base, folder / "bone", folder / "merged", keep_delta=delta, card=False)
    merged = _files(folder / "merged")
    yield "merged", merged
    yield "delta", {"delta": delta.read_bytes()}
    yield "onnx", _graph(folder / "graph")
    yield "onnx-inline", _graph(folder / "inline", "raw")
    yield "onnx-typed", _graph(folder / "typed", "typed")


def _graph(folder: Path, storage: Any = "external") -> Case:
    from tests.graphs.onnx_files import make_graph

    weights = {"a.weight": grid((4, 8)), "b": grid((8,), F16), "c": np.zeros((0, 4), F32)}
    make_graph(folder / "model.onnx", weights, storage, modules={"a.weight": "model/a"})
    return _files(folder)


def _cases(*names: str) -> Callable[[], list[Case]]:
    return lambda: [_made()[name] for name in names]


# --- readers ----------------------------------------------------------------------------------


def _read_json(folder: Path) -> None:
    text = (folder / "a.json").read_bytes()
    try:
        parse(text)
    except ValueError as error:
        assert not isinstance(error, UnicodeError), error
    parse_object(text, folder / "a.json")


def _read_safetensors(folder: Path) -> None:
    for tensor in read_header(folder / "model.safetensors").tensors.values():
        assert isinstance(tensor, StoredTensor)
        assert 0 <= tensor.nbytes <= SMALL


def _read_adapter(folder: Path) -> None:
    adapter = read_adapter(folder)
    for tensor in (*(b.tensor for b in adapter.blocks.values()), *adapter.saved.values()):
        assert tensor.nbytes <= SMALL
    for block in adapter.blocks.values():
        block.tensor.read()
    inspect(folder)


def _validate(folder: Path) -> None:
    for violation in validate(folder).violations:
        error = violation.error()
        if not str(error).isprintable():
            raise error


def _read_native(folder: Path) -> None:
    _validate(folder)
    read_adapter(folder)


def _read_index(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert all(tensor.nbytes <= SMALL for tensor in checkpoint.tensors.values())
    inspect(folder)


def _read_candidate(folder: Path) -> None:
    open_candidate(folder, CandidateKind.CHECKPOINT)


def _read_pipeline(folder: Path) -> None:
    (folder / "unet").mkdir(exist_ok=True)
    pipeline = open_pipeline(folder)
    for name in pipeline.components:
        try:
            pipeline.open(name)
        except BoneconvError as error:
            if not str(error).isprintable():
                raise
    pipeline.other_files(())


def _read_config(folder: Path) -> None:
    edits = ConfigEdits(folder / "config.json")
    edits.refuse_quantised()
    edits.vocabulary_sizes()
    edits.set_dtype("bfloat16")
    edits.untie()
    edits.encode()
    classes_of(folder, ())
    try:
        edits.resize_vocabulary(8, 9)
    except BoneconvError as error:
        if not str(error).isprintable():
            raise


def _read_pth(folder: Path) -> None:
    path = folder / "adapter.pth"
    for tensor in locate_tensors(path).values():
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= path.stat().st_size
    _validate(folder)
    read_adapter(folder)


def _read_delta(folder: Path) -> None:
    delta = open_delta(folder / "delta")
    for name in delta.document.files:
        delta.file(name)
    for shard in delta.document.shards:
        delta.head(shard.name)


def _read_document(folder: Path) -> None:
    Document.parse((folder / "document.json").read_bytes(), folder / "document.json")


def _read_record(folder: Path) -> None:
    read_record(folder)


def _read_onnx(folder: Path) -> None:
    from boneconv.graphs.model import open_graph
    from boneconv.graphs.quantised import refuse_quantised

    graph = open_graph(folder / "model.onnx")
    _ = graph.uses, graph.ops, graph.largest
    refuse_quantised(graph)
    for tensor in graph.initializers.values():
        assert tensor.nbytes <= SMALL
        tensor.read()


def _read_wire(folder: Path) -> None:
    from boneconv.graphs.wire import WireError, cut

    with suppress(WireError):
        assert len(cut(memoryview((folder / "model.onnx").read_bytes()))) <= SMALL


# --- seeds of one file ------------------------------------------------------------------------


def _json_seeds() -> list[Case]:
    values: list[Any] = [
        {"a": 1, "b": [1.5, None, True, "text\n"], "c": {"d": {}}},
        {"names": ["x", "y"], "shape": [1, 2, 3], "deep": [[[[]]]]},
    ]
    return [{"a.json": json.dumps(value).encode()} for value in values]


def _index_seeds() -> list[Case]:
    return [_made()["shards"], _made()["base"]]


def _pipeline_seeds() -> list[Case]:
    value = {
        "_class_name": "Pipeline",
        "_diffusers_version": "0.30",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
    }
    return [{"model_index.json": json.dumps(value).encode(), "x.safetensors": b""}]


def _config_seeds() -> list[Case]:
    values: list[dict[str, Any]] = [
        {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "tie_word_embeddings": True},
        {"text_config": {"vocab_size": 8}, "vision_config": {"dtype": "float16"}, "dtype": "x"},
        {"quantization_config": None, "vocab_size": VOCABULARY, "architectures": None},
    ]
    return [{"config.json": json.dumps(value).encode()} for value in values]


def _document_seeds() -> list[Case]:
    file = _made()["delta"]["delta"]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "delta"
        path.write_bytes(file)
        return [{"document.json": open_delta(path).document.encode()}]


def _record_seeds() -> list[Case]:
    return [{"boneconv.json": _made()["merged"]["boneconv.json"]}]


def _pth_seeds() -> list[Case]:
    cases = []
    with tempfile.TemporaryDirectory() as name:
        for variant in ("bone", "bat"):
            blocks = {f"model.{Q}": block_for(variant, (8, 8))}
            adapter = make_adapter(Path(name) / variant, variant, blocks=blocks, axis="in")
            path = Path(name) / f"{variant}.pth"
            write_rwkv(read_adapter(adapter), path)
            cases.append({"adapter.pth": path.read_bytes()})
    return cases


def _native_seeds() -> list[Case]:
    cases = [_made()[f"{variant}-native"] for variant in ("bone", "bat", "mini")]
    alone = [
        {name: c for name, c in case.items() if name != "adapter_config.json"} for case in cases
    ]
    return [*cases, *alone]


def _safetensors_seeds() -> list[Case]:
    native = _made()["bone-native"]["adapter_model.safetensors"]
    bare = pack({"a": grid((2, 3)), "b": grid((0, 3)), "c": grid(()), "d": np.arange(3)})
    return [{"model.safetensors": each} for each in (native, bare, pack({}))]


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("json", _read_json, _json_seeds),
        Target("safetensors", _read_safetensors, _safetensors_seeds, 2),
        Target("adapter", _read_adapter, _cases("bone", "bat", "mini"), 5),
        Target("native", _read_native, _native_seeds, 6),
        Target("validate", _validate, _cases("bone", "bat", "mini"), 5),
        Target("index", _read_index, _index_seeds, 5),
        Target("candidate", _read_candidate, _index_seeds, 4),
        Target("config", _read_config, _config_seeds, 3),
        Target("pipeline", _read_pipeline, _pipeline_seeds, 3),
        Target("pth", _read_pth, _pth_seeds, 20),
        Target("delta", _read_delta, _cases("delta"), 3),
        Target("document", _read_document, _document_seeds, 2),
        Target("record", _read_record, _record_seeds, 2),
        Target("onnx", _read_onnx, _cases("onnx", "onnx-inline", "onnx-typed"), 5),
        Target("wire", _read_wire, _cases("onnx", "onnx-inline", "onnx-typed"), 2),
    )
}
