"""Writing reports: a file is whole or as it was before, a step's summary is added to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from boneconv.errors import UsageError
from boneconv.io.files import machine_errors, replacing

__all__ = ["SUMMARY_VARIABLE", "append_summary", "check_places", "write_report"]

#: Names the file that GitHub shows as the summary of a step.
SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"
#: GitHub refuses the whole summary of a step above it.
_SUMMARY_LIMIT = 1024 * 1024


def check_places(places: Iterable[Path], inputs: Iterable[str]) -> None:
    """Holds the reports' paths against each other and the inputs, before any work is done.

    Raises:
        UsageError: A report would replace another, an input or a folder.
    """
    taken = {Path(given).resolve() for given in inputs}
    for place in places:
        if place.is_dir():
            raise UsageError("a report is a file", path=place, found="a folder")
        if place.resolve() in taken:
            raise UsageError("a report would replace another or an input", path=place)
        taken.add(place.resolve())


def write_report(path: Path, text: str) -> None:
    """Writes a report under its name once it is complete; an older one is replaced.

    Raises:
        MachineError: The folder cannot be written, or the disk is full.
    """
    with machine_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_bytes(text.encode())


def append_summary(text: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Adds a text to the summary of the step of GitHub's CI that this runs in.

    Args:
        text: Markdown.
        environment: Where the summary's file is named.

    Returns:
        Whether it was added: not where this is no such step, or no room is left.

    Raises:
        MachineError: The file cannot be written.
    """
    given = environment.get(SUMMARY_VARIABLE)
    if not given:
        return False
    path, content = Path(given), f"{text}\n".encode()
    with machine_errors(path):
        before = path.stat().st_size if path.exists() else 0
        if before + len(content) > _SUMMARY_LIMIT:
            return False
        with path.open("ab") as file:
            file.write(content)
    return True
