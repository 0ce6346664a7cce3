"""Reading a native adapter: a folder, or its safetensors file alone.

`open_native` checks all rules that headers can break and reads no tensor; the numbers themselves
(R23) are checked by whoever reads them, and by `check_values`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boneconv.adapter import Adapter
from boneconv.config import CONFIG_NAME
from boneconv.formats.beside import tokenizer_files
from boneconv.formats.native.container import read_container
from boneconv.formats.native.content import NativeAdapter, to_adapter
from boneconv.formats.native.fields import parse_metadata
from boneconv.formats.native.metadata import Metadata
from boneconv.formats.native.peft_config import FREE_FIELDS, config_faults, read_config
from boneconv.formats.native.rules import StageFailed, fail_on, first_error
from boneconv.formats.native.tensors import tensor_faults, value_faults
from boneconv.io.safetensors import SafetensorsFile

__all__ = ["WEIGHTS_NAME", "OpenedAdapter", "open_native", "read"]

WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass(frozen=True)
class OpenedAdapter:
    """The files of a native adapter, checked.

    Attributes:
        path: The folder or the file.
        file: The safetensors file.
        metadata: What it says.
        config: adapter_config.json, where it is there.
    """

    path: Path
    file: SafetensorsFile
    metadata: Metadata
    config: Mapping[str, Any] | None

    @property
    def content(self) -> NativeAdapter:
        """What the files hold."""
        config = self.config or {}
        free = {name: config[name] for name in FREE_FIELDS if name in config}
        return NativeAdapter(self.metadata, self.file.tensors, free)


def open_native(path: Path, *, values: bool = False) -> OpenedAdapter:
    """Reads the headers of an adapter and checks them.

    Args:
        path: A folder that holds adapter_model.safetensors, or the safetensors file, whatever its
            name. An adapter_config.json is read from a folder, and from beside a file of that name.
        values: Whether to read the tensors too, and check that they are finite (R23).

    Raises:
        StageFailed: All violations of the first stage that fails.
        MissingPathError: The file is not there.
        MachineError: It cannot be read.
    """
    weights = path / WEIGHTS_NAME if path.is_dir() else path
    file = read_container(weights)
    metadata = parse_metadata(file.metadata, weights)
    config_path = weights.with_name(CONFIG_NAME)
    has_config = config_path.is_file() and weights.name == WEIGHTS_NAME
    config = read_config(config_path) if has_config else None
    faults = list(tensor_faults(metadata, file.tensors, weights))
    if config is not None:
        faults += config_faults(metadata, file.tensors, config, config_path)
    if values:
        faults += value_faults(file.tensors, weights)
    fail_on(faults)
    return OpenedAdapter(path, file, metadata, config)


def read(path: Path) -> Adapter:
    """Reads a native adapter; tensor values stay on disk.

    Args:
        path: As in `open_native`.

    Raises:
        InputError: The class of the first rule that is broken, with the rule's number.
        MissingPathError, MachineError: As `open_native`.
    """
    try:
        opened = open_native(path)
    except StageFailed as failed:
        raise first_error(failed) from failed
    folder = path if path.is_dir() else None
    side_files = () if folder is None else tokenizer_files(folder)
    return to_adapter(opened.content, folder or path, opened.file.path, side_files)
