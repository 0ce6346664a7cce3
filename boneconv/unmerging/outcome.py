"""The output of an unmerge, checked against the digests that merges keep, and its record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from boneconv.delta import DeltaFile
from boneconv.engine.plan import Action, Plan
from boneconv.engine.stream import ShardDigests
from boneconv.errors import FormatError, listing
from boneconv.kernels.inverse import Measures
from boneconv.unmerging.matching import Merged
from boneconv.unmerging.records import (
    RECORD_NAME,
    AdapterRecord,
    MergeRecord,
    RestoredTensor,
    encode_record,
)

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What an unmerge has to give, and what it gave.

    Attributes:
        source: The merged checkpoint.
        merge: Its record.
        adapters: What is taken out of it.
        delta: The delta file.
        delta_digest: Its BLAKE3 digest.
        plan: What is written.
    """

    source: Path
    merge: MergeRecord | None
    adapters: Sequence[Merged]
    delta: DeltaFile | None
    delta_digest: str | None
    plan: Plan

    def identity(self) -> bytes:
        """What else determines the output."""
        adapters = [(each.digest, each.scale) for each in self.adapters]
        return json.dumps(["unmerge", adapters, self.delta_digest]).encode()

    def record_bytes(self, digests: ShardDigests) -> bytes:
        """Checks the output, before it is published, and makes its record.

        A base that was itself a merged folder gets its own record back.
        """
        self._check(digests)
        if self.delta is not None and RECORD_NAME in self.delta.document.files:
            return self.delta.file(RECORD_NAME)
        return encode_record(
            adapters=[AdapterRecord(each.digest, each.scale) for each in self.adapters],
            delta=self.delta_digest,
            restored=self.restored(digests),
            digests={name: found.output for name, found in digests.items()},
        )

    def restored(self, digests: ShardDigests) -> tuple[RestoredTensor, ...]:
        """What is known of each tensor that was computed."""
        found = []
        for tensor in self.plan.by_action(Action.MERGE):
            measures = Measures(*(digests[tensor.name].measures or (0.0, 1.0)))
            condition = measures.condition or None
            exact = self._is_exact(tensor.name, digests)
            found.append(RestoredTensor(tensor.name, measures.bound, condition, exact))
        return tuple(found)

    def _is_exact(self, name: str, digests: ShardDigests) -> bool | None:
        if self.delta is not None:
            return True
        if self.merge is None:
            return None
        return digests[name].output == self.merge.tensors[name].base_digest

    def _check(self, digests: ShardDigests) -> None:
        if self.delta is not None:
            wanted = {name: each.digest for name, each in self.delta.document.tensors.items()}
            found = {name: each.output for name, each in digests.items()}
            text = "what was restored is not the base"
            hint = "The checkpoint or the delta file has changed since the merge"
        elif self.merge is not None:
            wanted = {name: each.digest for name, each in self.merge.tensors.items()}
            found = {name: each.base or each.output for name, each in digests.items()}
            text = "the checkpoint is not the one that its record describes"
            hint = "It has changed since the merge"
        else:
            return
        wrong = [name for name in wanted if found.get(name) != wanted[name]]
        if wrong:
            raise FormatError(f"{text}: {listing(wrong)}", path=self.source, hint=hint)
