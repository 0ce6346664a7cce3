"""Whether the base is the one that native adapters were made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from boneconv.digest import stored_digest
from boneconv.formats.native import Violation, mismatch
from boneconv.io.files import Reader
from boneconv.io.safetensors import StoredTensor
from boneconv.planning import MergePlan

__all__ = ["base_mismatches"]


def base_mismatches(plan: MergePlan, known: Mapping[tuple[Path, str], str]) -> list[Violation]:
    """What adapters were made for another base: a violation of R30 for each of these.

    Args:
        plan: The adapters, and their homes in the base.
        known: Digests of the base's tensors that were read anyway, by file and name.
    """
    found: list[Violation] = []
    for strength, homes in zip(plan.strengths, plan.accounts.homes, strict=True):
        names: Sequence[str] = list(strength.adapter.base_digests)
        base = {name: _digest(homes[name], known) for name in names}
        violation = mismatch(strength.adapter, base)
        found += [] if violation is None else [violation]
    return found


def _digest(stored: StoredTensor, known: Mapping[tuple[Path, str], str]) -> str:
    digest = known.get((stored.path, stored.name))
    if digest is None:
        with Reader(stored.path) as reader:
            digest = stored_digest(stored, reader)
    return digest
