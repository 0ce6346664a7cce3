"""Whether a base is the one that native adapters were made for (rule R30 of the format)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from boneconv.digest import stored_digest
from boneconv.formats.native import Violation, mismatch
from boneconv.io.files import Reader
from boneconv.io.safetensors import StoredTensor
from boneconv.planning.plan import MergePlan

__all__ = ["base_mismatches"]


def base_mismatches(plan: MergePlan, digests: Mapping[str, str | None]) -> list[Violation]:
    """What adapters were made for another base: a violation for each of these.

    Args:
        plan: The adapters, and their homes in the base.
        digests: Of what was merged into, as far as it was read anyway, by the plan's names. Others
            that an adapter names are made here, such as that of a weight which another adapter
            replaced.

    Raises:
        FormatError, MachineError: The base cannot be read.
    """
    known = _by_place(plan, digests)
    found = []
    for part in plan.parts:
        for strength, homes in zip(part.strengths, part.accounts.homes, strict=True):
            adapter = strength.adapter
            base = {name: _digest(homes[name], known) for name in adapter.base_digests}
            violation = mismatch(adapter, base)
            found += [] if violation is None else [violation]
    return found


def _by_place(plan: MergePlan, digests: Mapping[str, str | None]) -> dict[tuple[Path, str], str]:
    """Digests by the file and the name that the base has a tensor under."""
    tensors = plan.plan.named
    return {
        (source.path, source.name): digest
        for name, digest in digests.items()
        if digest is not None and isinstance(source := tensors[name].source, StoredTensor)
    }


def _digest(stored: StoredTensor, known: Mapping[tuple[Path, str], str]) -> str:
    digest = known.get((stored.path, stored.name))
    if digest is None:
        with Reader(stored.path) as reader:
            digest = stored_digest(stored, reader)
    return digest
