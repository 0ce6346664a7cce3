"""Rules of the native format that only a merge can check: R23, R30 and R31."""

from __future__ import annotations

from collections.abc import Sequence

from boneconv.digest import stored_digest
from boneconv.engine.plan import Action, Plan
from boneconv.engine.stream import ShardDigests
from boneconv.errors import NonFiniteError
from boneconv.formats.native import Violation, mismatch, value_faults
from boneconv.io.files import Reader
from boneconv.io.safetensors import StoredTensor
from boneconv.planning.accounts import Strength
from boneconv.planning.part import Part

__all__ = ["mismatches", "numbered"]


def mismatches(parts: Sequence[Part], plan: Plan, digests: ShardDigests) -> list[Violation]:
    """What adapters were made for another base: a violation of R30 for each of these adapters.

    The digests come from the merge itself, which has read the weights anyway. A weight that another
    adapter replaced was not read, and is read here.
    """
    known = {
        (tensor.source.path, tensor.source.name): digests[name].base
        for name, tensor in plan.named.items()
        if tensor.action is Action.MERGE and isinstance(tensor.source, StoredTensor)
    }
    pairs = [
        (strength.adapter, homes)
        for part in parts
        for strength, homes in zip(part.strengths, part.accounts.homes, strict=True)
    ]
    found = []
    for adapter, homes in pairs:
        base = {}
        for name in adapter.base_digests:
            stored = homes[name]
            base[name] = known.get((stored.path, stored.name)) or _read_digest(stored)
        violation = mismatch(adapter, base)
        found += [] if violation is None else [violation]
    return found


def numbered(error: NonFiniteError, strengths: tuple[Strength, ...]) -> NonFiniteError:
    """A merge's error with the number of the rule that a native adapter breaks, if one is merged.

    Where the numbers of an adapter are to blame, that is R23, else R31.
    """
    native = [strength.adapter for strength in strengths if strength.adapter.is_native]
    for adapter in native:
        tensors = [*(block.tensor for block in adapter.blocks.values()), *adapter.saved.values()]
        stored = {t.name: t for t in tensors if isinstance(t, StoredTensor)}
        for violation in value_faults(stored, adapter.weights):
            return NonFiniteError(f"R23: {violation.message}", path=violation.path)
    if not native:
        return error
    return error.restated(f"R31: {error.message}", error.path)


def _read_digest(tensor: StoredTensor) -> str:
    with Reader(tensor.path) as reader:
        return stored_digest(tensor, reader)
