"""Runs for the tests of staging."""

from __future__ import annotations

from pathlib import Path

import pytest

from boneconv.io.staging import Staging


def failed_run(out: Path, error: BaseException, *, key: str = "k", force: bool = False) -> None:
    """A run that finishes one file and then fails."""
    with (
        pytest.raises(type(error)),
        Staging(out, key=key, is_file=False, force=force) as staging,
    ):
        (staging.target / "one").write_text("1")
        staging.record("one", {"digest": "d1"})
        raise error
