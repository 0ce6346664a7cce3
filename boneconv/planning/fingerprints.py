"""Whether a base is the one that native adapters were made for (rule R30 of the format)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from boneconv.digest import stored_digest
from boneconv.formats.native import Violation, mismatch
from boneconv.io.files import Reader
from boneconv.io.safetensors import StoredTensor
from boneconv.planning.part import Part

__all__ = ["KnownDigests", "base_mismatches"]

#: Digests of a base's tensors, by file and name.
KnownDigests = Mapping[tuple[Path, str], str]


def base_mismatches(parts: Sequence[Part], known: KnownDigests) -> list[Violation]:
    """What adapters were made for another base: a violation for each of these.

    Args:
        parts: The adapters, and their homes in the base.
        known: Digests of tensors that were read anyway. Others that an adapter names are read here.

    Raises:
        FormatError, MachineError: The base cannot be read.
    """
    pairs = [
        (strength.adapter, homes)
        for part in parts
        for strength, homes in zip(part.strengths, part.accounts.homes, strict=True)
    ]
    found = []
    for adapter, homes in pairs:
        digests = {name: _digest(homes[name], known) for name in adapter.base_digests}
        violation = mismatch(adapter, digests)
        found += [] if violation is None else [violation]
    return found


def _digest(stored: StoredTensor, known: KnownDigests) -> str:
    digest = known.get((stored.path, stored.name))
    if digest is None:
        with Reader(stored.path) as reader:
            digest = stored_digest(stored, reader)
    return digest
