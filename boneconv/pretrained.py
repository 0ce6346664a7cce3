"""What every part that works with transformers' models needs beside the library itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from boneconv.errors import MissingExtraError
from boneconv.strict_json import read_object

__all__ = ["image_size", "quiet_transformers", "require_libraries"]

#: Pixels along an edge, where nothing says.
_USUAL_IMAGE = 224


def require_libraries(libraries: Iterable[str], purpose: str, extra: str) -> None:
    """Raises MissingExtraError where a library is not installed.

    Args:
        libraries: Their names.
        purpose: What needs them, for the message.
        extra: The extra of boneconv that brings them.
    """
    for library in libraries:
        if find_spec(library) is None:
            raise MissingExtraError(
                f"{purpose} needs {library}",
                hint=f"Install it with: pip install 'boneconv[{extra}]'",
            )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps the library's remarks and bars off the user's screen."""
    logging = import_module("transformers").utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def image_size(config: Any, folder: Path) -> tuple[int, int]:
    """Height and width of a model's images: the configuration's, else the processor's.

    Args:
        config: A configuration of transformers.
        folder: The model's.
    """
    sizes = [getattr(config, "image_size", None)]
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        content = read_object(processor)
        sizes += [content.get("crop_size"), content.get("size")]
    for size in sizes:
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple) and len(size) == 2:
            return int(size[0]), int(size[1])
        if isinstance(size, dict) and {"height", "width"} <= size.keys():
            return int(size["height"]), int(size["width"])
    return _USUAL_IMAGE, _USUAL_IMAGE
