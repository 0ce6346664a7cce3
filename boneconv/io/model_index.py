"""model_index.json: what makes a folder a diffusers pipeline, and which components it names."""

from __future__ import annotations

import os
from pathlib import Path

from boneconv.strict_json import read_object

__all__ = ["MODEL_INDEX", "read_components"]

MODEL_INDEX = "model_index.json"

#: A folder's name has no more bytes on common file systems.
_LONGEST_NAME = 255


def read_components(folder: Path) -> tuple[str, ...] | None:
    """The names of a pipeline's components, sorted; None for a folder that is no pipeline.

    A component is named with its library and class, and lies in a folder of its name. One that the
    pipeline can have and has not is named with nulls.

    Raises:
        FormatError: model_index.json is malformed.
    """
    path = folder / MODEL_INDEX
    if not path.is_file():
        return None
    return tuple(
        sorted(
            name
            for name, value in read_object(path).items()
            if isinstance(value, list)
            and len(value) == 2
            and all(isinstance(part, str) for part in value)
            and name.isidentifier()
            and len(os.fsencode(name)) <= _LONGEST_NAME
        )
    )
