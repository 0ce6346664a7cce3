"""Rules of the native format that a merge checks as it reads: R23, R30 and R31."""

from __future__ import annotations

from collections.abc import Sequence

from boneconv.engine.plan import Action, Plan
from boneconv.engine.stream import ShardDigests
from boneconv.errors import NonFiniteError
from boneconv.formats.native import Violation, value_faults
from boneconv.io.safetensors import StoredTensor
from boneconv.planning.accounts import Strength
from boneconv.planning.fingerprints import base_mismatches
from boneconv.planning.part import Part

__all__ = ["mismatches", "numbered"]


def mismatches(parts: Sequence[Part], plan: Plan, digests: ShardDigests) -> list[Violation]:
    """What adapters were made for another base: a violation of R30 for each of these adapters.

    The digests come from the merge itself, which has read the weights anyway. A weight that another
    adapter replaced was not read, and is read here.
    """
    known = {}
    for name, tensor in plan.named.items():
        digest = digests[name].base if tensor.action is Action.MERGE else None
        if digest is not None and isinstance(tensor.source, StoredTensor):
            known[tensor.source.path, tensor.source.name] = digest
    return base_mismatches(parts, known)


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
