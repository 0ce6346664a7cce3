"""The folders of vectors on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vector_sources.adapters import Adapter
from vector_sources.cases import Bad, Case
from vector_sources.files import file_of, laid_out, packed
from vector_sources.merge import merged

ERRORS = {
    "FormatError": "R01 R02 R03 R04 R06 R07 R08 R09 R19 R24",
    "NotABoneAdapterError": "R05 R25",
    "ConfigError": "R10 R11 R12 R15 R16 R26 R27",
    "NameMatchError": "R13 R14 R17 R18 R28",
    "ShapeError": "R20 R21 R22 R29",
    "NonFiniteError": "R23 R31",
    "BaseMismatchError": "R30",
}
ERROR_OF = {rule: error for error, rules in ERRORS.items() for rule in rules.split()}


def write(path: Path, data: bytes) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write(path, text.encode("ascii"))


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write an adapter's two files."""
    write(folder / "adapter_model.safetensors", packed(*file_of(adapter)))
    if adapter.config is not None:
        write_json(folder / "adapter_config.json", adapter.config)


def write_case(folder: Path, case: Case) -> None:
    """Write a valid vector."""
    listed = []
    for number, adapter in enumerate(case.adapters, 1):
        path = "adapter" if number == 1 else f"adapter{number}"
        write_adapter(folder / path, adapter)
        listed.append({"path": path, "strength": adapter.strength})
    write(folder / "base.safetensors", packed(*laid_out(case.base, {})))
    write(folder / "expected.safetensors", packed(*laid_out(merged(case), {})))
    about: dict[str, Any] = {"title": case.title, "sections": case.sections.split()}
    about |= {"adapters": listed, "base": "base.safetensors", "expected": "expected.safetensors"}
    about |= {"peft": case.peft}
    about |= {"ties": case.ties} if case.ties else {}
    about |= {"dtype": case.dtype} if case.dtype else {}
    write_json(folder / "case.json", about)


def write_bad(folder: Path, bad: Bad) -> None:
    """Write an invalid vector."""
    about: dict[str, Any] = {"title": bad.title, "rule": bad.rule}
    about |= {"error": ERROR_OF[bad.rule]}
    about["adapters"] = [{"path": "adapter", "strength": bad.strength}]
    write(folder / "adapter" / "adapter_model.safetensors", bad.file)
    if bad.config is not None:
        write(folder / "adapter" / "adapter_config.json", bad.config)
    if bad.base is not None:
        write(folder / "base.safetensors", packed(*laid_out(bad.base, {})))
        about["base"] = "base.safetensors"
    write_json(folder / "case.json", about)
