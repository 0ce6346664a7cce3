"""The one guard of the process."""

from __future__ import annotations

from functools import cache

import pytest

from tests.fuzz.guard import Guard


@cache
def _guard() -> Guard:
    return Guard()


@pytest.fixture
def guard() -> Guard:
    return _guard()
