"""The names by which a graph with adapter inputs, its adapter files and the loader find each other.

A module's block is the graph's input ``<module>.bone_block`` ``[r, out]``, or, for BAT in its
activation form, ``<module>.bat_block`` ``[out / r, r, r]``. Both are initializers of zeros, so that
a caller who feeds nothing gets the base. The module is named as the base's checkpoint names the
tensor that holds its weight, without ``.weight``.

The graph's metadata holds a number under `VERSION_KEY`, drawn from the graph's weights and inputs.
Adapter files carry the same number as their model version.
"""

from __future__ import annotations

__all__ = ["BAT_SUFFIX", "BONE_SUFFIX", "VERSION_KEY", "is_block", "module_of"]

BONE_SUFFIX = ".bone_block"
BAT_SUFFIX = ".bat_block"
VERSION_KEY = "boneconv.runtime_adapters"


def is_block(name: str) -> bool:
    """Whether an input's name is one that an adapter's block goes by."""
    return name.endswith((BONE_SUFFIX, BAT_SUFFIX))


def module_of(name: str) -> str:
    """The module whose block an input holds."""
    return name.removesuffix(BONE_SUFFIX).removesuffix(BAT_SUFFIX)
