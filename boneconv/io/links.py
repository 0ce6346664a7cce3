"""Links in a folder from a stranger: they may lead about in it, but not out of it.

A link out of the folder would copy a file of this machine into an output that is then published.
The Hub's cache is made of links, from ``snapshots/<commit>`` to ``blobs``: those are followed.
"""

from __future__ import annotations

from pathlib import Path

from boneconv.errors import FormatError

__all__ = ["check_inside"]


def check_inside(folder: Path, path: Path) -> None:
    """Checks that a file of a folder lies in it, wherever links lead.

    Args:
        folder: The folder; it may be a link itself.
        path: A path below it. A link that leads nowhere inside is not this check's business.

    Raises:
        FormatError: It lies elsewhere.
    """
    target = path.resolve()
    if not any(target.is_relative_to(home) for home in _homes(folder.resolve())):
        raise FormatError(
            "a link leads out of its folder",
            path=path,
            expected=f"a file in {folder}",
            found=str(target),
            hint="Put the file itself there if you trust where the folder came from",
        )


def _homes(folder: Path) -> list[Path]:
    """The folder, and the blobs of the Hub's cache where it is a snapshot or lies in one."""
    blobs = [
        place.parent.parent / "blobs"
        for place in (folder, *folder.parents)
        if place.parent.name == "snapshots"
    ]
    return [folder, *blobs[:1]]
