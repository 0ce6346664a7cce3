"""Merging against copying and against PEFT, side by side.

    python benchmarks/merge.py FOLDER [--sizes 1b 4b] [--rounds 5] [--peft]

FOLDER needs room for the checkpoints and one more copy of each. Tools take turns; the old output is
removed, and the disk flushed, outside the clock. Prints the table that RESULTS.md holds and, with
--plot, draws it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import SIZES, make
from processes import Memory, Timing, memory_run, time_run

HERE = Path(__file__).parent
BONECONV = str(Path(sys.executable).with_name("boneconv"))


@dataclass(frozen=True)
class Tool:
    """A way to make OUT; ``{base}``, ``{adapter}`` and ``{out}`` are filled in."""

    name: str
    command: tuple[str, ...]

    def fill(self, folder: Path, variant: str) -> list[str]:
        """The command for a checkpoint and a variant."""
        places = {
            "{base}": str(folder / "base"),
            "{adapter}": str(folder / variant),
            "{out}": str(folder / "out"),
        }
        return [places.get(word, word) for word in self.command]


_PARTS = (sys.executable, str(HERE / "merge_parts.py"), "{base}", "{adapter}", "{out}")
CP = Tool("cp -r", ("cp", "-r", "{base}", "{out}"))
CP_SYNC = Tool("cp -r; sync", ("sh", "-c", 'cp -r "$0" "$1" && sync', "{base}", "{out}"))
MERGE = Tool("boneconv", (BONECONV, "merge", "{base}", "{adapter}", "{out}", "--quiet"))
NO_FLUSH = Tool("- fsync", (*_PARTS, "--no-flush"))
NO_DIGESTS = Tool("- fsync - digests", (*_PARTS, "--no-flush", "--no-digests"))
PLAIN = Tool("- fsync - digests - canonical", (*_PARTS, "--no-flush", "--no-digests", "--plain"))
PEFT = Tool(
    "PEFT 0.18.1",
    (sys.executable, "-W", "ignore", str(HERE / "peft_merge.py"), "{base}", "{adapter}", "{out}"),
)


def measure(
    folder: Path, variant: str, tools: Iterable[Tool], rounds: int
) -> dict[str, list[Timing]]:
    """Times every tool in turn, ``rounds`` times, after a round that does not count."""
    times: dict[str, list[Timing]] = {tool.name: [] for tool in tools}
    for number in range(rounds + 1):
        for tool in tools:
            _clear(folder)
            timing = time_run(tool.fill(folder, variant))
            if number:
                times[tool.name].append(timing)
    _clear(folder)
    return times


def peak(folder: Path, variant: str, tool: Tool) -> Memory:
    """A tool's peak memory, in a run of its own."""
    _clear(folder)
    found = memory_run(tool.fill(folder, variant))
    _clear(folder)
    return found


def rows(times: dict[str, list[Timing]], memory: dict[str, Memory]) -> list[str]:
    """Table rows: medians, and the median of the ratios taken round by round."""
    lines = []
    for name, runs in times.items():
        ratio = statistics.median(
            run.wall / copy.wall for run, copy in zip(runs, times[CP.name], strict=True)
        )
        flushed = statistics.median(
            run.wall / copy.wall for run, copy in zip(runs, times[CP_SYNC.name], strict=True)
        )
        wall = statistics.median(run.wall for run in runs)
        cpu = statistics.median(run.cpu for run in runs)
        used = memory.get(name)
        memory_cells = (
            f"{used.resident / 1e6:.0f} | {used.anonymous / 1e6:.0f}" if used else "- | -"
        )
        lines.append(
            f"| {name} | {wall:.2f} | {cpu:.2f} | {ratio:.2f} | {flushed:.2f} | {memory_cells} |"
        )
    return lines


def _clear(folder: Path) -> None:
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(folder / "out.partial", ignore_errors=True)
    os.sync()


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1b"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peft", action="store_true", help="PEFT too (needs the model's memory)")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores")
    for size in options.sizes:
        folder = options.folder / size
        if not (folder / "bat" / "adapter_config.json").is_file():
            make(folder, SIZES[size])
        subprocess.run(["sh", "-c", 'cat "$0"/*/*.safetensors > /dev/null', folder], check=True)
        for variant in ("bone", "bat"):
            tools = [CP, CP_SYNC, MERGE, NO_FLUSH, NO_DIGESTS, PLAIN]
            tools += [PEFT] if options.peft else []
            times = measure(folder, variant, tools, options.rounds)
            measured = [tool for tool in tools if tool in (MERGE, PEFT)]
            memory = {tool.name: peak(folder, variant, tool) for tool in measured}
            print(f"\n### {size}, {variant}\n")
            print("| | wall s | CPU s | wall / cp | wall / (cp; sync) | peak MB | anonymous MB |")
            print("| --- | --- | --- | --- | --- | --- | --- |")
            print("\n".join(rows(times, memory)), flush=True)


if __name__ == "__main__":
    main()
