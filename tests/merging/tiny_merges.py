"""What the tests of merges of tiny models share."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import boneconv
from boneconv.config import Variant
from boneconv.kernels import Stage
from tests.builders import Array, pack, unpack
from tests.merging.rare import RARE
from tests.oracle import tiny
from tests.oracle.architectures import ARCHITECTURES

WEIGHTS = "adapter_model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module", autouse=True)
def rare_architectures() -> Iterator[None]:
    """The oracle looks architectures up in its table; here it finds the rare ones too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, architecture in RARE.items():
            patch.setitem(ARCHITECTURES, name, architecture)  # type: ignore[arg-type]
        yield


def merge_case(case: tiny.Case, out: Path, **options: object) -> boneconv.MergeResult:
    """Merges a case's adapter into its base."""
    return boneconv.merge(case.base, case.adapter, out, **options)


def actions_of(out: Path) -> dict[str, str]:
    """What the record of a merge says of each tensor."""
    record = json.loads((out / "boneconv.json").read_text())
    return {name: entry["action"] for name, entry in record["tensors"].items()}


def weights_of(folder: Path) -> dict[str, Array]:
    """The tensors of a folder with one weight file."""
    return unpack(folder / "model.safetensors")


def adapter_of(case: tiny.Case) -> dict[str, Array]:
    """The adapter's tensors by their names in the model."""
    tensors = unpack(case.adapter / WEIGHTS)
    return {name.removeprefix(tiny.PREFIX): tensor for name, tensor in tensors.items()}


def blocks_of(case: tiny.Case) -> dict[str, Array]:
    """The adapter's blocks by the parameter that they update."""
    return {
        name.removesuffix(suffix) + ".weight": block
        for name, block in adapter_of(case).items()
        for suffix in tiny.BLOCKS
        if name.endswith(suffix)
    }


def stage_of(case: tiny.Case, block: Array) -> Stage:
    variants = {"bone": "bone", "miss": "bone", "bat": "bat", "miss-bat": "bat", "mini": "mini"}
    return Stage(Variant(variants[case.variant]), block)


def rewritten(case: tiny.Case, folder: Path, tensors: Mapping[str, Array]) -> tiny.Case:
    """The case with other tensors in its adapter."""
    shutil.copytree(case.adapter, folder)
    (folder / WEIGHTS).write_bytes(pack(tensors, {"format": "pt"}))
    return dataclasses.replace(case, adapter=folder)
