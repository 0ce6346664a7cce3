"""Verification against the merge that made what is verified, side by side.

    python benchmarks/verify.py FOLDER [--size 1b] [--rounds 3]

FOLDER needs room for the checkpoint and two copies of it. Candidates are the canonical merge and
one that accumulates in float32, whose bytes differ here and there. Merging and verifying take
turns; prints medians, the ratio, and the peak memory of a verification.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command line does

from checkpoints import SIZES, make
from processes import Timing, memory_run, time_run

HERE = Path(__file__).parent
MERGE = "import sys, boneconv; boneconv.merge(*sys.argv[1:4], card=False)"
VERIFY = (
    "import sys; from boneconv.verification import verify; "
    "report = verify(*sys.argv[1:4]); sys.exit(not report.passed)"
)


def _python(code: str, *arguments: Path) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def _clear(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)
    os.sync()


def _plain(folder: Path, variant: str, out: Path) -> None:
    """A merge that accumulates in float32."""
    _clear(out)
    places = (str(folder / "base"), str(folder / variant), str(out))
    parts = (sys.executable, str(HERE / "merge_parts.py"), *places)
    subprocess.run([*parts, "--no-flush", "--no-digests", "--plain"], check=True)
    (out / "boneconv.json").unlink(missing_ok=True)


def measure(folder: Path, variant: str, rounds: int) -> None:
    """Prints a line for each candidate."""
    base, adapter = folder / "base", folder / variant
    out, plain = folder / "out", folder / "plain"
    _plain(folder, variant, plain)
    times: dict[str, list[Timing]] = {"merge": [], "canonical": [], "float32": []}
    for number in range(rounds + 1):
        _clear(out)
        taken = {"merge": time_run(_python(MERGE, base, adapter, out))}
        taken["canonical"] = time_run(_python(VERIFY, base, adapter, out))
        taken["float32"] = time_run(_python(VERIFY, base, adapter, plain))
        for name, timing in taken.items():
            if number:
                times[name].append(timing)
    used = memory_run(_python(VERIFY, base, adapter, plain))
    for name in ("canonical", "float32"):
        pairs = list(zip(times[name], times["merge"], strict=True))
        ratio = statistics.median(each.wall / merge.wall for each, merge in pairs)
        cpu = statistics.median(each.cpu / merge.cpu for each, merge in pairs)
        wall = statistics.median(each.wall for each, _ in pairs)
        merge = statistics.median(each.wall for _, each in pairs)
        memory = f"{used.resident / 1e6:.0f} | {used.anonymous / 1e6:.0f}"
        numbers = f"{merge:.2f} | {wall:.2f} | {ratio:.2f} | {cpu:.2f}"
        print(f"| {variant} | {name} | {numbers} | {memory} |", flush=True)
    _clear(out)
    _clear(plain)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder / options.size
    if not (folder / "bat" / "adapter_config.json").is_file():
        make(folder, SIZES[options.size])
    print(
        "| adapter | candidate | merge s | verify s | ratio | CPU ratio | peak MB | anonymous MB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for variant in ("bone", "bat"):
        measure(folder, variant, options.rounds)


if __name__ == "__main__":
    main()
