"""PEFT 0.18 announces on every use that Bone ends with 0.19; the tests know."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep PEFT's deprecation of Bone out of the tests' output, and no other warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Bone will be removed", category=UserWarning)
        yield
