"""The small adapter that most invalid vectors break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vector_sources.adapters import made
from vector_sources.files import PREFIX, file_of, packed

Edit = Callable[[dict[str, Any]], Any]


def broken(edit: Edit, *args: Any, **options: Any) -> bytes:
    """The file of a small adapter whose metadata was edited."""
    adapter, _ = made("bad", *(args or ("bone", {"q": (2, 4, 6)})), **options)
    edit(adapter.meta)
    return packed(*file_of(adapter))


def header_of(**changes: Any) -> tuple[dict[str, Any], bytes]:
    """The header and data of a small adapter, its block's entry changed."""
    adapter, _ = made("bad", "bone", {"q": (2, 4, 6)})
    header, data = file_of(adapter)
    header[f"{PREFIX}q.bone_block"] |= changes
    return header, data
