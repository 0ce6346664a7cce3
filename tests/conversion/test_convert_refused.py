"""What `convert` refuses, and that it checks what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import boneconv
from boneconv.errors import (
    FormatError,
    InputError,
    MachineError,
    NameMatchError,
    NonFiniteError,
    OutputExistsError,
    ShapeError,
    UsageError,
)
from boneconv.formats.writing import TensorFile
from tests.builders import (
    DOWN,
    EMBEDDING,
    F32,
    HIDDEN,
    RANK,
    VOCABULARY,
    Q,
    Raw,
    base_tensors,
    blocks_for_all,
    grid,
    make_adapter,
    make_base,
    module,
    snapshot,
)
from tests.conversion.folders import FOLDER, TENSORS

# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("bone", {"to": "gguf"}, "cannot convert to 'gguf'"),
        ("bone", {"to": "peft-miss", "rank": 4}, "belong to --to peft-lora"),
        ("bone", {"to": "peft-miss", "base": "base"}, "--base belongs to"),
        ("bone", {"to": "native", "pad_rank": True}, "belong to --to peft-lora"),
        ("bone", {"to": "peft-lora"}, "does not say how wide"),
        ("bone", {"to": "peft-lora", "base": "base", "rank": 4}, "becomes a LoRA exactly"),
        ("mini", {"to": "peft-lora", "base": "base", "energy": 0.9}, "becomes a LoRA exactly"),
        ("bat", {"to": "peft-lora", "base": "base"}, "by approximation only"),
        ("bat", {"to": "peft-lora", "base": "base", "rank": 4, "energy": 0.9}, "exclude each"),
        ("bat", {"to": "peft-lora", "base": "base", "rank": 0}, "must be positive"),
        ("bat", {"to": "peft-lora", "base": "base", "energy": 1.5}, "is a share"),
        ("bat", {"to": "peft-lora", "base": "base", "energy": float("nan")}, "is a share"),
        ("bat", {"to": "peft-lora", "base": "base", "rank": 4, "max_error": -1.0}, "negative"),
        ("bat", {"to": "peft-lora", "base": "base", "max_error": float("nan")}, "negative"),
        ("bone", {"to": "rwkv"}, "is one file"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, variant: str, options: dict[str, Any], message: str
) -> None:
    adapter = make_adapter(tmp_path / "a", variant)
    if "base" in options:
        options = options | {"base": make_base(tmp_path / "base")}
    with pytest.raises(UsageError, match=message):
        boneconv.convert(adapter, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("to", "out"), [("peft-miss", "a.safetensors"), ("peft-lora", "a.pth"), ("native", "a.pth")]
)
def test_a_folder_is_not_named_like_a_file(tmp_path: Path, to: str, out: str) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        boneconv.convert(make_adapter(tmp_path / "a"), tmp_path / out, to=to)


def test_the_output_is_never_an_input_and_never_overwritten(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputExistsError):
        boneconv.convert(adapter, tmp_path / "there", to="peft-miss")
    boneconv.convert(adapter, tmp_path / "there", to="peft-miss", force=True)
    assert set(snapshot(tmp_path / "there")) == FOLDER
    before = snapshot(adapter)
    for out in (adapter, adapter / "inside", tmp_path):
        with pytest.raises(UsageError, match="must not be, hold or lie in an input"):
            boneconv.convert(adapter, out, to="peft-miss", force=True)
    assert snapshot(adapter) == before


def test_a_base_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    tensors = base_tensors()
    del tensors[f"{module(1, DOWN)}.weight"]
    lacking = make_base(tmp_path / "lacking", tensors)
    wide = make_base(tmp_path / "wide", base_tensors() | {f"{module(0, Q)}.weight": grid((16, 12))})
    quantised = make_base(
        tmp_path / "q",
        base_tensors()
        | {f"{module(0, Q)}.weight": Raw("U8", (HIDDEN, HIDDEN), bytes(HIDDEN * HIDDEN))},
    )
    for base, error in ((lacking, NameMatchError), (wide, ShapeError), (quantised, InputError)):
        with pytest.raises(error, match=r"q_proj|down_proj"):
            boneconv.convert(adapter, tmp_path / "out", to="peft-lora", base=base)
    assert not list(tmp_path.glob("out*"))


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    blocks = blocks_for_all("bat")
    blocks[module(1, Q)] = np.full((HIDDEN // RANK, RANK, RANK), np.nan, F32)
    adapter = make_adapter(tmp_path / "a", "bat", blocks=blocks)
    base = make_base(tmp_path / "base")
    with pytest.raises(NonFiniteError, match=r"'model\.layers\.1\.self_attn\.q_proj'"):
        boneconv.convert(adapter, tmp_path / "out", to="peft-lora", base=base, rank=2)
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_without_blocks_is_no_lora(tmp_path: Path) -> None:
    saved = {EMBEDDING: grid((VOCABULARY, HIDDEN))}
    adapter = make_adapter(tmp_path / "a", blocks={}, saved=saved)
    with pytest.raises(UsageError, match="no blocks"):
        boneconv.convert(adapter, tmp_path / "l", to="peft-lora", base=make_base(tmp_path / "b"))


# --- it checks itself -------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["peft-bone", "peft-miss", "peft-lora", "rwkv"])
def test_a_file_that_reads_back_differently_is_not_published(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses a byte on the way."""
    write = TensorFile._write
    lost = []

    def lossy(self: TensorFile, hasher: Any, data: memoryview, offset: int) -> None:
        write(self, hasher, data, offset)
        if not lost:
            lost.append(offset)
            self._writer.write_at(bytes([data[0] ^ 1]), offset)

    monkeypatch.setattr(TensorFile, "_write", lossy)
    adapter = make_adapter(tmp_path / "a")
    out = tmp_path / ("out.pth" if to == "rwkv" else "out")
    more = {"base": make_base(tmp_path / "base")} if to == "peft-lora" else {}
    with pytest.raises(MachineError, match="reads back differently"):
        boneconv.convert(adapter, out, to=to, **more)
    assert lost
    assert not out.exists()


def test_a_damaged_adapter_leaves_nothing_behind(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    weights = adapter / TENSORS
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(FormatError):
        boneconv.convert(adapter, tmp_path / "out", to="peft-miss")
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
