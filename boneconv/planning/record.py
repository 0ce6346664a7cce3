"""boneconv.json: what was merged. No times, paths or worker counts: outputs compare equal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from boneconv import __version__
from boneconv.engine.dequantise import Dequantisation
from boneconv.engine.plan import RECORD_NAME, Action, Plan
from boneconv.engine.stream import ShardDigests, TensorDigests
from boneconv.io.hub import Source
from boneconv.planning.accounts import Strength
from boneconv.planning.card import hub_id

__all__ = ["RECORD_NAME", "adapter_entry", "encode_record", "record_size", "source_entry"]


_ANY_DIGEST = "0" * 64


def source_entry(source: Source) -> dict[str, Any]:
    """Where an input came from: its repository and commit, nothing for a local path."""
    return {} if source.repo is None else {"repo": source.repo, "commit": source.commit}


def adapter_entry(
    strength: Strength, source: Source, digest: str = _ANY_DIGEST, *, component: str | None = None
) -> dict[str, Any]:
    """An adapter: its format, variant, rank, scale, and the digest of its weights file.

    In a pipeline, the component too that it was merged into.
    """
    adapter = strength.adapter
    return {
        **({} if component is None else {"component": component}),
        **source_entry(source),
        "format": adapter.format,
        "variant": str(adapter.config.variant),
        "axis": str(adapter.config.axis),
        "rank": adapter.config.r,
        "scale": strength.scale,
        "blake3": digest,
        "trained_on": hub_id(adapter.config.base_model_name_or_path),
        "unknown_fields": sorted(adapter.config.unknown),
    }


def record_size(
    plan: Plan,
    *,
    base: Mapping[str, Any],
    adapters: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> int:
    """The record's length in bytes, which does not depend on what the digests are."""
    digests = dict.fromkeys(plan.named, TensorDigests(_ANY_DIGEST, _ANY_DIGEST))
    return len(encode_record(plan, digests, base=base, adapters=adapters, options=options))


def encode_record(
    plan: Plan,
    digests: ShardDigests,
    *,
    base: Mapping[str, Any],
    adapters: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    fingerprint_ignored: bool = False,
) -> bytes:
    """The record's bytes: canonical JSON, sorted and indented.

    Args:
        plan: What was written.
        digests: Digests of all tensors, by `PlannedShard.output_name`.
        base: Where the base came from.
        adapters: Entries of the adapters.
        options: What else determined the output.
        fingerprint_ignored: Whether an adapter was merged into another base than it names.
    """
    tensors: dict[str, Any] = {}
    for name, tensor in plan.named.items():
        entry: dict[str, Any] = {"action": str(tensor.action), "digest": digests[name].output}
        if tensor.action is Action.MERGE:
            entry["base_digest"] = digests[name].base or ""
        if isinstance(tensor.kernel, Dequantisation):
            scale = tensor.kernel.scale
            entry["dequantised"] = {
                "dtype": tensor.source.dtype,
                "scale": None if scale is None else scale.name,
            }
        tensors[name] = entry
    record = {
        "boneconv": __version__,
        "record_version": 1,
        "numerics": "canonical",
        "digest": "blake3-1MiB",
        "base": dict(base),
        "adapters": [dict(adapter) for adapter in adapters],
        "options": dict(options),
        "tensors": tensors,
        "left_out": [str(path) for path in plan.left_out],
    }
    if fingerprint_ignored:
        record["fingerprint_ignored"] = True
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()
