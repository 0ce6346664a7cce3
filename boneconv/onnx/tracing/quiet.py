"""Keeps what exporters print out of a program's output, whose stdout is for results."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from boneconv.pretrained import quiet_transformers

__all__ = ["quiet_export"]

#: Loggers that remark on every operator the installed libraries lack or have several of.
_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Silences stdout, warnings and the libraries' remarks; errors still come through."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with (
            quiet_transformers(),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
