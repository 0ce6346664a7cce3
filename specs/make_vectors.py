"""Write the conformance vectors of the Bone Adapter Format 1.0, byte for byte the same every time.

    python specs/make_vectors.py [FOLDER]

Needs blake3 beside the standard library. The arithmetic is rational, element by element, straight
from the equations of section 7, and shares no code with `run_vectors.py`. Numbers come from
SHA-256 of their labels, so that no library's random generator is part of the vectors.

What is written is in the package `vector_sources`, beside this file.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from vector_sources.digests import digests
from vector_sources.invalid.bases import bases
from vector_sources.invalid.configs import configs
from vector_sources.invalid.containers import containers
from vector_sources.invalid.metadata import metadata
from vector_sources.invalid.tensors import tensors
from vector_sources.valid import formats, modules, roundings, strengths, variants
from vector_sources.writing import write_bad, write_case, write_json


def main() -> None:
    """Write all vectors, in place of the old ones."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "vectors"
    for kind in ("valid", "invalid"):
        shutil.rmtree(folder / kind, ignore_errors=True)
    for make in (variants, modules, strengths, roundings, formats):
        for name, case in make().items():
            write_case(folder / "valid" / name, case)
    for make in (containers, metadata, tensors, configs, bases):
        for name, bad in make().items():
            write_bad(folder / "invalid" / f"{bad.rule.lower()}-{name}", bad)
    write_json(folder / "digests.json", digests())


if __name__ == "__main__":
    main()
