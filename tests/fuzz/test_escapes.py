"""Names from strangers, through the real command line: nothing that a terminal obeys is printed.

A name that clears the screen or begins a line of its own may stand wherever a file has a name:
none of it may reach stdout or stderr as it is, whether the command refuses the file or shows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boneconv.cli import run
from tests.builders import (
    HIDDEN,
    Q,
    adapter_config,
    base_tensors,
    block_for,
    entry,
    grid,
    make_adapter,
    make_base,
    module,
    pack,
    raw_file,
    write_index,
)

EVIL = "x\x1b[2J\x1b]0;owned\x07\nError: forged\r\x9b31m\u202e"
Q0 = module(0, Q)
MERGE = ["merge", "base", "adapter", "out"]
INSPECT, VALIDATE = ["inspect", "adapter"], ["validate", "adapter"]
VERIFY = ["verify", "base", "adapter", "candidate"]
DIFF = ["diff", "base", "candidate"]
EXPORT = ["export-onnx", "base", "adapter", "out.onnx", "--graph", "model.onnx"]


def _weights(folder: Path, name: str, tensors: dict[str, Any], metadata: Any = None) -> None:
    (folder / name).write_bytes(pack(tensors, metadata))


def _config(folder: Path, **fields: Any) -> None:
    (folder / "adapter/adapter_config.json").write_text(json.dumps(adapter_config(**fields)))


def evil_module(folder: Path) -> None:
    make_adapter(folder / "adapter", blocks={EVIL: block_for("bone", (HIDDEN, HIDDEN))})


def evil_saved(folder: Path) -> None:
    blocks = {Q0: block_for("bone", (HIDDEN, HIDDEN))}
    make_adapter(folder / "adapter", blocks=blocks, saved={f"{EVIL}.weight": grid((2, 2))})


def evil_fields(folder: Path) -> None:
    _config(folder, base_model_name_or_path=EVIL, task_type=EVIL, **{EVIL: EVIL})


def evil_type(folder: Path) -> None:
    _config(folder, peft_type=EVIL)


def evil_values(folder: Path) -> None:
    _config(folder, bias=EVIL)


def evil_key(folder: Path) -> None:
    text = json.dumps({EVIL: 1})
    path = folder / "adapter/adapter_config.json"
    path.write_text(f"{text[:-1]}, {text[1:]}")


def evil_entry(folder: Path) -> None:
    path = folder / "adapter/adapter_model.safetensors"
    path.write_bytes(raw_file({EVIL: EVIL, "b": {EVIL: EVIL}}))


def evil_dtype(folder: Path) -> None:
    path = folder / "adapter/adapter_model.safetensors"
    path.write_bytes(raw_file({EVIL: entry(EVIL, [1], 0, 4)}, bytes(4)))


def evil_metadata(folder: Path) -> None:
    path = folder / "adapter/adapter_model.safetensors"
    path.write_bytes(raw_file({"__metadata__": {"bone_adapter": EVIL, EVIL: EVIL}}))
    (folder / "adapter/adapter_config.json").unlink()


def evil_base(folder: Path) -> None:
    for name in ("base", "candidate"):
        seed = len(name)
        tensors = base_tensors(seed=seed) | {EVIL: grid((3,), seed=seed)}
        make_base(folder / name, tensors, files={f"{EVIL}.txt".replace("/", ""): "x"})


def evil_shard(folder: Path) -> None:
    for name in ("base", "candidate"):
        _weights(folder, f"{name}/{EVIL}.safetensors", base_tensors(), {EVIL: EVIL})
        (folder / name / "model.safetensors").unlink()
        write_index(folder / name, dict.fromkeys(base_tensors(), f"{EVIL}.safetensors"))


def evil_index(folder: Path) -> None:
    for name in ("base", "candidate"):
        write_index(folder / name, {EVIL: f"{EVIL}.safetensors", "b": f"../{EVIL}"})


def evil_model(folder: Path) -> None:
    config = {"architectures": [EVIL], "quantization_config": {"quant_method": EVIL}}
    (folder / "base/config.json").write_text(json.dumps(config))


def evil_architecture(folder: Path) -> None:
    (folder / "base/config.json").write_text(json.dumps({"architectures": [EVIL]}))


def evil_record(folder: Path) -> None:
    record = {"record_version": EVIL, "adapters": EVIL, EVIL: EVIL}
    (folder / "candidate/boneconv.json").write_text(json.dumps(record))


def evil_pipeline(folder: Path) -> None:
    (folder / "base/model_index.json").write_text(json.dumps({EVIL: [EVIL, EVIL], "a": ["b", "c"]}))


def evil_graph(folder: Path) -> None:
    from tests.graphs.onnx_files import identity, make_graph

    nodes = [identity(EVIL, EVIL.replace("/", "")), identity("b")]
    nodes[1].op_type = EVIL
    weights = {EVIL: grid((4, 4)), "b": grid((4, 4))}
    make_graph(folder / "model.onnx", weights, "raw", nodes=nodes)


def evil_location(folder: Path) -> None:
    import onnx

    from tests.graphs.onnx_files import make_graph

    make_graph(folder / "model.onnx", {Q0: grid((4, 4))})
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for each in model.graph.initializer[0].external_data:
        each.value = EVIL
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def evil_scopes(folder: Path) -> None:
    from tests.graphs.onnx_files import make_graph

    weights = {f"{Q0}{EVIL}.weight": grid((HIDDEN, HIDDEN))}
    make_graph(folder / "model.onnx", weights, "raw")


CASES: list[tuple[Callable[[Path], None], list[list[str]]]] = [
    (evil_module, [MERGE, INSPECT, [*INSPECT, "-v"], [*INSPECT, "--json"], VALIDATE, VERIFY]),
    (evil_saved, [MERGE, INSPECT, VALIDATE, VERIFY]),
    (evil_fields, [MERGE, INSPECT, [*INSPECT, "--json"], VALIDATE]),
    (evil_type, [MERGE, INSPECT, VALIDATE, VERIFY]),
    (evil_values, [MERGE, INSPECT, VALIDATE]),
    (evil_key, [MERGE, INSPECT, VALIDATE]),
    (evil_entry, [MERGE, INSPECT, VALIDATE]),
    (evil_dtype, [MERGE, INSPECT, VALIDATE]),
    (evil_metadata, [MERGE, INSPECT, VALIDATE, [*VALIDATE, "--json"]]),
    (evil_base, [MERGE, ["inspect", "base"], DIFF, [*DIFF, "--json"], VERIFY]),
    (evil_shard, [MERGE, ["inspect", "base"], DIFF, VERIFY]),
    (evil_index, [MERGE, ["inspect", "base"], DIFF, VERIFY]),
    (evil_model, [MERGE, VERIFY, EXPORT[:4]]),
    (evil_architecture, [EXPORT[:4]]),
    (evil_record, [VERIFY, DIFF, ["unmerge", "candidate", "adapter", "out"]]),
    (evil_pipeline, [MERGE, ["inspect", "base"], [*MERGE, "--component", EVIL]]),
    (evil_graph, [EXPORT]),
    (evil_location, [EXPORT]),
    (evil_scopes, [EXPORT]),
]


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        pytest.param(make, arguments, id=f"{make.__name__}-{' '.join(arguments)[:40]!a}")
        for make, commands in CASES
        for arguments in commands
    ],
)
def test_nothing_that_a_terminal_obeys_is_printed(
    make: Callable[[Path], None],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_base(tmp_path / "base")
    make_base(tmp_path / "candidate")
    make_adapter(tmp_path / "adapter")
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = run(arguments)
    printed = capsys.readouterr()
    assert code in (0, 1, 2, 3)
    for text in (printed.out, printed.err):
        assert all(line.isprintable() for line in text.split("\n")), repr(text)
        assert not any(line.startswith("Error: forged") for line in text.split("\n")), text
    assert printed.out or printed.err
    assert "Traceback" not in printed.err
