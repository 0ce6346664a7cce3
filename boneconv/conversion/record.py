"""boneconv.json beside a converted adapter: what it was made of, and how far off it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from boneconv import __version__
from boneconv.adapter import Adapter
from boneconv.conversion.options import Options
from boneconv.conversion.to_lora import ModuleError
from boneconv.digest import file_digest
from boneconv.engine.plan import RECORD_NAME
from boneconv.io.hub import Source

__all__ = ["RECORD_NAME", "encode_record"]


def encode_record(
    adapter: Adapter,
    source: Source,
    base: Source | None,
    options: Options,
    rank: int,
    errors: Sequence[ModuleError],
) -> bytes:
    """The record's bytes: JSON, sorted and indented, without times and paths.

    ``modules`` holds each module's error ``|dW - B A|_F / |dW|_F``, to four digits: what a later
    check of the converted adapter may find.
    """
    record = {
        "boneconv": __version__,
        "record_version": 1,
        "converted_to": str(options.to),
        "adapter": {
            **_origin(source),
            "format": adapter.format,
            "variant": str(adapter.config.variant),
            "axis": str(adapter.config.axis),
            "rank": adapter.config.r,
            "scale": adapter.scale,
            "blake3": file_digest(adapter.weights),
        },
        "base": {} if base is None else _origin(base),
        "options": options.record(),
        "rank": rank,
        "modules": {each.module: {"error": float(f"{each.error:.4g}")} for each in errors},
        "worst_error": float(f"{max((each.error for each in errors), default=0.0):.4g}"),
    }
    return (json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _origin(source: Source) -> dict[str, Any]:
    return {} if source.repo is None else {"repo": source.repo, "commit": source.commit}
