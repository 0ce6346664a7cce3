"""Rules of the native format that a merge finds broken as it computes: R23 and R31."""

from __future__ import annotations

from boneconv.errors import NonFiniteError
from boneconv.formats.native import value_faults
from boneconv.io.safetensors import StoredTensor
from boneconv.planning.accounts import Strength

__all__ = ["numbered"]


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
