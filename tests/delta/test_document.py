"""The document of a delta file: what it says comes back, and nothing impossible is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from boneconv.delta.document import Document, ShardEntry, StoredFile, TensorEntry, UpdateEntry
from boneconv.errors import FormatError

PATH = Path("some.delta")
DOCUMENT = Document(
    adapters=("a" * 64,),
    shards=(ShardEntry("model.safetensors", "h", ("x", "y", "z")),),
    tensors={
        "x": TensorEntry("I64", (3,), "dx", "copy", "dx"),
        "y": TensorEntry(
            "BF16", (4, 2), "dy", "correct", "my", (UpdateEntry(0, "y", 0.3, 1e-18),), 4
        ),
        "z": TensorEntry("F32", (), "dz", "stored"),
    },
    files={"config.json": StoredFile("c", False), "sub/README.md": StoredFile("r", True)},
    left_out=("pytorch_model.bin",),
)


def test_a_document_comes_back() -> None:
    assert Document.parse(DOCUMENT.encode(), PATH) == DOCUMENT


def _set(*keys: Any, to: Any) -> Any:
    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return change


WRONG = {
    "no shards": _set("shards", to=[]),
    "a tensor in no shard": _set("shards", 0, "tensors", to=["x", "y"]),
    "a tensor twice": _set("shards", 0, "tensors", to=["x", "y", "z", "z"]),
    "a shard outside": _set("shards", 0, "name", to="../model.safetensors"),
    "a file outside": _set("files", to={"../../x": {"digest": "d", "stored": True}}),
    "an absolute file": _set("files", to={"/etc/x": {"digest": "d", "stored": True}}),
    "a drive": _set("files", to={"C:/x": {"digest": "d", "stored": True}}),
    "a backslash": _set("files", to={"..\\x": {"digest": "d", "stored": True}}),
    "a file as a tensor": _set("single_file", to=True),
    "an unknown way": _set("tensors", "x", "how", to="guess"),
    "an unknown dtype": _set("tensors", "x", "dtype", to="F7"),
    "a negative size": _set("tensors", "x", "shape", to=[-3]),
    "a size of another kind": _set("tensors", "x", "shape", to=[3.0]),
    "no rows": _set("tensors", "y", "rows", to=0),
    "a scalar with rows": _set("tensors", "y", "shape", to=[]),
    "integers corrected": _set("tensors", "y", "dtype", to="I16"),
    "stored and merged": _set("tensors", "z", "merged", to="m"),
    "copied from nowhere": _set("tensors", "x", "merged", to=None),
    "an adapter that is not there": _set("tensors", "y", "updates", 0, "adapter", to=1),
    "a scale that is no number": _set("tensors", "y", "updates", 0, "scale", to="1"),
    "no adapters": _set("adapters", to=None),
    "a digest that is no text": _set("tensors", "x", "digest", to=5),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_impossible_document_is_refused(name: str) -> None:
    value = json.loads(DOCUMENT.encode())
    WRONG[name](value)
    with pytest.raises(FormatError, match="document is malformed"):
        Document.parse(json.dumps(value).encode(), PATH)


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"adapters": [], "adapters": []}', b"\xff"])
def test_what_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(FormatError):
        Document.parse(text, PATH)
