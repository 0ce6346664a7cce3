"""Things made once per machine: built beside their place, then renamed into it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

LIBRARIES = ("gguf", "peft", "tokenizers", "torch", "transformers")


def default_cache() -> Path:
    """`BONECONV_TEST_CACHE`, or `.cache/tests` in the repository."""
    repository = Path(__file__).resolve().parents[2]
    return Path(os.environ.get("BONECONV_TEST_CACHE") or repository / ".cache" / "tests")


def made(cache: Path, name: str, recipe: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache, building it where it is not there yet.

    Args:
        cache: Folder that holds everything made.
        name: What is made.
        recipe: Version of how it is made; another one, or another version of a library in
            `LIBRARIES`, makes it anew.
        build: Fills the empty folder it is given. A build that fails or is killed leaves nothing
            that a later call would take for the finished folder.
    """
    target = cache / f"{name}-{_key(recipe)}"
    partial = target.with_name(target.name + ".partial")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(target.name + ".lock")):
        if not target.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            partial.rename(target)
    return target


def _key(recipe: str) -> str:
    versions = [f"{library}=={importlib.metadata.version(library)}" for library in LIBRARIES]
    return hashlib.sha256("\n".join([recipe, *versions]).encode()).hexdigest()[:12]
