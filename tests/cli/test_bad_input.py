"""Bad input through the real command line: code 2, a short message, nothing written.

A case makes what is wrong in a folder that holds a good ``base`` and a good ``adapter``. The
message names the file and says what to do; there is no traceback, and all files stay as they were.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boneconv.cli import run
from tests.builders import (
    BF16,
    F16,
    F32,
    HIDDEN,
    RANK,
    Array,
    Q,
    Raw,
    adapter_config,
    base_tensors,
    block_for,
    blocks_for_all,
    entry,
    grid,
    make_adapter,
    make_base,
    module,
    pack,
    raw_file,
    snapshot,
    unpack,
    write_index,
)

Q0 = module(0, Q)
BASE, ADAPTER, OUT = "base", "adapter", "out"
WEIGHTS, BLOCKS = "base/model.safetensors", "adapter/adapter_model.safetensors"
CONFIG, BASE_CONFIG = "adapter/adapter_config.json", "base/config.json"
INDEX = "base/model.safetensors.index.json"
MERGE = ["merge", BASE, ADAPTER, OUT]


@dataclass(frozen=True)
class Case:
    """Bad input.

    Attributes:
        make: Makes it, in the folder it is called in.
        names: What the message must name: the file, or the option.
        says: What else the message must say.
        arguments: The command line.
        code: The exit code.
    """

    make: Callable[[], Any]
    names: str
    says: tuple[str, ...] = ()
    arguments: tuple[str, ...] = tuple(MERGE)
    code: int = 2


def _write(name: str, content: bytes | str) -> Callable[[], Any]:
    data = content.encode() if isinstance(content, str) else content
    return lambda: Path(name).write_bytes(data)


def _config(**fields: Any) -> Callable[[], Any]:
    return _write(CONFIG, json.dumps(adapter_config() | fields))


def _cut(name: str, nbytes: int) -> Callable[[], Any]:
    return lambda: os.truncate(name, Path(name).stat().st_size - nbytes)


def _adapter(variant: str = "bone", **options: Any) -> Callable[[], Any]:
    return lambda: make_adapter(Path(ADAPTER), variant, **options)


def _base(tensors: dict[str, Array | Raw]) -> Callable[[], Any]:
    return lambda: make_base(Path(BASE), base_tensors() | tensors)


def _sharded(weight_map: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    """A base of two shards whose index was tampered with."""

    def make() -> None:
        Path(WEIGHTS).unlink()
        make_base(Path(BASE), shards=2)
        names = json.loads(Path(INDEX).read_text())["weight_map"]
        write_index(Path(BASE), weight_map(names))

    return make


def _poison(name: str, tensor: str, value: float) -> Callable[[], Any]:
    """One element of a tensor of a file."""

    def make() -> None:
        tensors = {key: array.copy() for key, array in unpack(Path(name)).items()}
        tensors[tensor].reshape(-1)[-1] = value
        Path(name).write_bytes(pack(tensors))

    return make


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


def _pickled_code() -> None:
    import torch

    Path(BLOCKS).unlink()
    torch.save({"x": _Evil()}, "adapter/adapter_model.bin")


def _overlapping() -> bytes:
    header = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}
    return raw_file(header, bytes(12))


def _nothing() -> None: ...


def _huge(name: str) -> Callable[[], Any]:
    return lambda: os.truncate(name, 65 * 1024 * 1024)


def _overflow() -> None:
    weight = np.full((HIDDEN, HIDDEN), 60000.0, F16)
    make_base(Path(BASE), base_tensors(F16) | {f"{Q0}.weight": weight})
    blocks = {Q0: np.full((RANK, HIDDEN), 6000.0, F32)}
    make_adapter(Path(ADAPTER), blocks=blocks)


def _swap() -> None:
    Path(BASE).rename("t")
    Path(ADAPTER).rename(BASE)
    Path("t").rename(ADAPTER)


NAN, INF = float("nan"), float("inf")
Q_KEY = f"base_model.model.{Q0}.bone_block"
ESCAPE = "model.\x1b[2J\x1b]0;owned\x07\u202e\x9b31m\nError: all is well"
LORA = {f"base_model.model.{Q0}.lora_{x}.weight": grid((4, HIDDEN)) for x in "AB"}

CASES: dict[str, Case] = {
    # --- safetensors
    "base truncated": Case(_cut(WEIGHTS, 1), WEIGHTS, ("truncated", "Download or copy it again")),
    "base cut in its header": Case(
        lambda: os.truncate(WEIGHTS, 50), WEIGHTS, ("header does not fit",)
    ),
    "base empty": Case(_write(WEIGHTS, b""), WEIGHTS, ("too short",)),
    "base of garbage": Case(_write(WEIGHTS, b"<!DOCTYPE html><html>"), WEIGHTS, ("header",)),
    "base is a pointer of git lfs": Case(
        _write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        WEIGHTS,
        ("not a safetensors file",),
    ),
    "base overlapping": Case(_write(WEIGHTS, _overlapping()), WEIGHTS, ("overlap",)),
    "base header too long": Case(
        _write(WEIGHTS, (10**9).to_bytes(8, "little") + bytes(100)),
        WEIGHTS,
        ("header does not fit", "1000000000"),
    ),
    "base of an unknown dtype": Case(
        _write(WEIGHTS, raw_file({"a": entry("F7", [0], 0, 0)})), WEIGHTS, ("unknown dtype 'F7'",)
    ),
    "adapter truncated": Case(_cut(BLOCKS, 4), BLOCKS, ("truncated",)),
    "adapter overlapping": Case(_write(BLOCKS, _overlapping()), BLOCKS, ("overlap",)),
    "adapter without tensors": Case(_write(BLOCKS, raw_file({})), BLOCKS, ("holds no tensors",)),
    # --- the index
    "index points above its folder": Case(
        _sharded(lambda names: names | {f"{Q0}.weight": "../adapter/adapter_model.safetensors"}),
        INDEX,
        ("points outside its folder",),
    ),
    "index points to an absolute path": Case(
        _sharded(lambda names: names | {f"{Q0}.weight": "/etc/passwd"}), INDEX, ("points outside",)
    ),
    "index names missing tensors": Case(
        _sharded(lambda names: names | {"ghost": "model-00001-of-00002.safetensors"}),
        INDEX,
        ("do not hold: ghost", "download both again"),
    ),
    "index names a missing shard": Case(
        _sharded(lambda names: names | {"ghost": "model-00003-of-00003.safetensors"}),
        "base/model-00003-of-00003.safetensors",
        ("no such file",),
    ),
    "index of lists": Case(
        _sharded(lambda names: names | {"ghost": ["a"]}), INDEX, ("points outside",)
    ),
    "index without a map": Case(_sharded(lambda names: {}), INDEX, ("no weight_map",)),
    "index beside a single file": Case(
        lambda: write_index(Path(BASE), {"a": "model-00001-of-00001.safetensors"}),
        BASE,
        ("holds both", "remove the stale one"),
    ),
    # --- shapes, variants, names
    "block of another width": Case(
        _adapter(blocks={Q0: grid((RANK, HIDDEN + 4))}),
        WEIGHTS,
        ("does not fit its weight [12, 12]", "expected [4, 12], found [4, 16]"),
    ),
    "block of another rank": Case(
        _config(r=8), BLOCKS, ("no bone block of rank 8", "Its config must name the variant")
    ),
    "bat blocks with a bone config": Case(
        _adapter("bone", blocks=blocks_for_all("bat")), BLOCKS, ("is no bone block",)
    ),
    "bone blocks with a bat config": Case(
        _adapter("bat", blocks=blocks_for_all("bone")), BLOCKS, ("is no bat block",)
    ),
    "bat of a rank that does not divide": Case(
        _adapter("bat", blocks={Q0: block_for("bat", (10, 10), rank=5)}, rank=5),
        WEIGHTS,
        ("rank 5 to divide both",),
    ),
    "unknown modules": Case(
        _adapter(blocks={"model.layers.0.experts.7": block_for("bone", (12, 12))}),
        BLOCKS,
        ("have no home in the base: model.layers.0.experts.7.weight", "trained on?"),
    ),
    "names with terminal escapes": Case(
        _adapter(blocks={ESCAPE: block_for("bone", (12, 12))}), BLOCKS, ("\\x1b[2J", "\\x9b31m")
    ),
    "a saved tensor of another shape": Case(
        _adapter(saved={"model.layers.0.norm.weight": grid((13,))}), BLOCKS, ("does not fit",)
    ),
    # --- the adapter's configuration
    "a lora adapter": Case(
        lambda: (_config(peft_type="LORA")(), Path(BLOCKS).write_bytes(pack(LORA))),
        CONFIG,
        ("expected peft_type BONE or MISS", "found peft_type 'LORA'"),
    ),
    "lora tensors with a bone config": Case(
        _write(BLOCKS, pack(LORA)), BLOCKS, ("have no home in the base",)
    ),
    "config no json": Case(_write(CONFIG, "peft_type: BONE\n"), CONFIG, ("not a JSON file",)),
    "config with repeated keys": Case(
        _write(CONFIG, '{"peft_type": "BONE", "r": 4, "r": 8}'), CONFIG, ("'r' stands twice",)
    ),
    "config with nan": Case(
        _write(CONFIG, '{"peft_type": "MISS", "miss_dropout": NaN}'), CONFIG, ("NaN is not JSON",)
    ),
    "config with an endless number": Case(
        _write(CONFIG, '{"peft_type": "MISS", "miss_dropout": 1e999}'), CONFIG, ("1e999",)
    ),
    "config huge": Case(_huge(CONFIG), CONFIG, ("too large",)),
    "config a list": Case(_write(CONFIG, "[]"), CONFIG, ("not a JSON object",)),
    "config of braces": Case(_write(CONFIG, '{"a":' * 99_999), CONFIG, ("nested too deeply",)),
    "config of bytes": Case(_write(CONFIG, b"\x80\x04\xff"), CONFIG, ("not UTF-8",)),
    "config with a rank of nothing": Case(_config(r=0), CONFIG, ("r must be a positive integer",)),
    "config with an unknown axis": Case(_config(axis="diagonal"), CONFIG, ("out or in",)),
    "config with an unknown variant": Case(
        _config(init_weights="dora"), CONFIG, ("init_weights names no variant", "'dora'")
    ),
    # --- the base's configuration
    "base config no json": Case(_write(BASE_CONFIG, "{"), BASE_CONFIG, ("not a JSON file",)),
    "base config with repeated keys": Case(
        _write(BASE_CONFIG, '{"a": 1, "a": 2}'), BASE_CONFIG, ("'a' stands twice",)
    ),
    "base quantised": Case(
        _write(BASE_CONFIG, '{"quantization_config": {"quant_method": "gptq"}}'),
        BASE_CONFIG,
        ("the base is quantised ('gptq')", "full-precision checkpoint"),
    ),
    # --- files that are not there, or not what they should be
    "no base": Case(_nothing, "nowhere", ("no such file",), ("merge", "./nowhere", ADAPTER, OUT)),
    "no adapter": Case(_nothing, "nowhere", ("no such",), ("merge", BASE, "./nowhere", OUT)),
    "no adapter config": Case(lambda: Path(CONFIG).unlink(), ADAPTER, ("not an adapter",)),
    "no adapter weights": Case(
        lambda: Path(BLOCKS).unlink(), ADAPTER, ("weights are missing", "adapter_model.safetensors")
    ),
    "no base weights": Case(
        lambda: Path(WEIGHTS).rename("base/tf_model.h5"),
        BASE,
        ("holds no safetensors weights", "save_pretrained"),
    ),
    "base weights a folder": Case(
        lambda: (Path(WEIGHTS).unlink(), Path(WEIGHTS).mkdir()), BASE, ("regular file",)
    ),
    "a side file that leads nowhere": Case(
        lambda: Path("base/vocab.json").symlink_to("gone"), "base/vocab.json", ("no such file",)
    ),
    "adapter and base swapped": Case(_swap, ADAPTER, ("not an adapter", "BASE comes first")),
    "adapter is the base": Case(_nothing, BASE, ("not an adapter",), ("merge", BASE, BASE, OUT)),
    "a second adapter that is none": Case(
        _nothing, BASE, ("not an adapter",), (*MERGE, "--adapter", BASE)
    ),
    "pickled code": Case(
        _pickled_code, "adapter/adapter_model.bin", ("more than tensors", "safetensors")
    ),
    "a torch file that is damaged": Case(
        lambda: Path(BLOCKS).rename("adapter/adapter_model.bin"),
        "adapter/adapter_model.bin",
        ("not a torch file",),
    ),
    # --- values
    "nan in the adapter": Case(_poison(BLOCKS, Q_KEY, NAN), BLOCKS, (f"{Q0}.weight", "finite")),
    "inf in the adapter": Case(_poison(BLOCKS, Q_KEY, INF), BLOCKS, (f"{Q0}.weight", "finite")),
    "nan in an adapted weight": Case(
        _poison(WEIGHTS, f"{Q0}.weight", NAN), WEIGHTS, (f"{Q0}.weight", "row 11, column 11")
    ),
    "inf in an adapted weight": Case(
        _poison(WEIGHTS, f"{Q0}.weight", -INF), WEIGHTS, (f"{Q0}.weight", "finite")
    ),
    "nan in a saved tensor": Case(
        _adapter(saved={"model.layers.0.norm.weight": np.full((HIDDEN,), NAN, F32)}),
        BLOCKS,
        ("model.layers.0.norm.weight",),
    ),
    "float16 overflow": Case(_overflow, WEIGHTS, (f"{Q0}.weight", "float16")),
    "overflow of a cast": Case(
        _base({"big": np.full((4,), 1e30, BF16)}),
        WEIGHTS,
        ("'big'", "float16"),
        (*MERGE, "--dtype", "float16"),
    ),
    "integer weight": Case(
        _base({f"{Q0}.weight": Raw("I8", (HIDDEN, HIDDEN), bytes(HIDDEN**2))}),
        WEIGHTS,
        ("cannot be merged into", "found I8", "Is the base quantised?"),
    ),
    "fp8 weight": Case(
        _base({f"{Q0}.weight": Raw("F8_E4M3", (HIDDEN, HIDDEN), bytes(HIDDEN**2))}),
        WEIGHTS,
        ("found F8_E4M3", "Is the base quantised?"),
    ),
    "integers in the adapter": Case(
        _write(BLOCKS, pack({Q_KEY: Raw("I8", (RANK, HIDDEN), bytes(RANK * HIDDEN))})),
        BLOCKS,
        ("cannot be merged", "found I8"),
    ),
    # --- options and places
    "bad dtype": Case(_nothing, "--dtype", ("int4",), (*MERGE, "--dtype", "int4")),
    "bad shard size": Case(
        _nothing, "'5 potatoes'", ("5GB or 500MiB",), (*MERGE, "--max-shard-size", "5 potatoes")
    ),
    "endless shard size": Case(
        _nothing, "not a size", ("5GB",), (*MERGE, "--max-shard-size", "9" * 400)
    ),
    "bad scale": Case(_nothing, "--scale", ("much",), (*MERGE, "--scale", "much")),
    "scale nan": Case(_nothing, "scale", ("not finite",), (*MERGE, "--scale", "nan")),
    "unknown device": Case(
        _nothing, "'abacus'", ("cpu, cuda or cuda:N",), (*MERGE, "--device", "abacus")
    ),
    "a device of another kind": Case(
        _nothing, "'meta'", ("unknown device",), (*MERGE, "--device", "meta")
    ),
    "a device that is not there": Case(
        _nothing, "'cuda:99'", ("no device", "Leave out --device"), (*MERGE, "--device", "cuda:99")
    ),
    "no workers": Case(_nothing, "--workers", ("x>=1",), (*MERGE, "--workers", "0")),
    "unknown option": Case(_nothing, "--colour", ("No such option",), (*MERGE, "--colour")),
    "unknown command": Case(_nothing, "blend", ("No such command",), ("blend", BASE)),
    "missing argument": Case(_nothing, "OUT", ("Missing argument",), ("merge", BASE, ADAPTER)),
    "out inside base": Case(
        _nothing, "base/new", ("must not be, hold or lie in",), ("merge", BASE, ADAPTER, "base/new")
    ),
    "out inside adapter": Case(
        _nothing, "adapter/new", ("must not be",), ("merge", BASE, ADAPTER, "adapter/new")
    ),
    "out is base": Case(
        _nothing, BASE, ("must not be, hold",), ("merge", BASE, ADAPTER, BASE, "--force")
    ),
    "out is here": Case(
        _nothing, ".", ("name of its own",), ("merge", BASE, ADAPTER, ".", "--force")
    ),
    "folder into file": Case(
        _nothing,
        "out.safetensors",
        ("a folder into a folder",),
        ("merge", BASE, ADAPTER, "out.safetensors"),
    ),
    "inspect nothing": Case(_nothing, "nowhere", ("no such file",), ("inspect", "./nowhere")),
    "inspect garbage": Case(
        _write(WEIGHTS, b"garbage!garbage!"), WEIGHTS, ("header does not fit",), ("inspect", BASE)
    ),
    "inspect a lora adapter": Case(
        _config(peft_type="LORA"), CONFIG, ("'LORA'",), ("inspect", ADAPTER)
    ),
    "demo into a folder that is there": Case(_nothing, BASE, ("exists",), ("demo", BASE)),
    "a dry run of bad input": Case(
        _cut(WEIGHTS, 1), WEIGHTS, ("truncated",), (*MERGE, "--dry-run")
    ),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / BASE)
    make_adapter(tmp_path / ADAPTER)
    return tmp_path


def test_there_are_at_least_thirty_cases() -> None:
    assert len(CASES) >= 30


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    case.make()
    before = snapshot(here)
    code = run(list(case.arguments))
    stdout, stderr = capfd.readouterr()
    assert code == case.code, stderr
    assert stdout == ""
    message = stderr.strip()
    assert case.names in message
    assert all(words in message for words in case.says), message
    assert "Traceback" not in message
    assert len(message) < 1500
    assert message.splitlines()[-1].startswith("Error: ")
    assert message.count("Error: ") == message.count("Error: all is well") + 1
    assert all(c.isprintable() or c == "\n" for c in message)
    assert snapshot(here) == before


def test_out_exists(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / OUT).mkdir()
    (here / OUT / "thesis.tex").write_text("years")
    before = snapshot(here)
    assert run(MERGE) == 2
    assert "out: the output exists already. Choose another place, or give --force" in (
        capfd.readouterr().err
    )
    assert snapshot(here) == before


def test_the_place_for_work_in_progress_is_taken(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "out.partial").mkdir()
    (here / "out.partial" / "thesis.tex").write_text("years")
    before = snapshot(here)
    assert run(MERGE) == 2
    assert "out.partial: this folder would be used for work in progress" in capfd.readouterr().err
    assert snapshot(here) == before


def test_a_failure_of_the_machine_is_code_3_and_keeps_what_is_done(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from boneconv.io import copying

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (here / BASE / "tokenizer.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(copying, "_clone", full)
        assert run(MERGE) == 3
    message = capfd.readouterr().err
    assert "the disk is full. Free some space and run the command again" in message
    assert not (here / OUT).exists()
    assert (here / "out.partial" / "out" / "model.safetensors").exists()
    assert run(MERGE) == 0
    assert not (here / "out.partial").exists()


def test_an_input_that_may_not_be_read_is_code_3(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = os.open

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith("model.safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert run(MERGE) == 3
    assert "Permission denied" in capfd.readouterr().err
    assert not (here / "out.partial").exists()


def test_a_lock_that_is_held_is_code_3(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from boneconv.io.lock import Lock

    (here / "out.partial").mkdir()
    with Lock(here / "out.partial" / "lock"):
        assert run(MERGE) == 3
    assert "another run is writing this output" in capfd.readouterr().err
