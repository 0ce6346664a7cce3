"""Merging against copying, PEFT and axolotl, side by side.

    python benchmarks/merge.py FOLDER [--sizes 1b 4b] [--rounds 5] [--no-parts] [--peft]
                                      [--axolotl] [--results merge.json] [--plot merge.svg]

FOLDER needs room for the checkpoints and one more copy of each. Tools take turns; outside the clock
the old output is removed, the disk flushed, and the page cache warmed. Prints the tables that
RESULTS.md holds and draws time and memory against size, those of earlier runs in the same --results
file too. axolotl merges the LoRA that is exactly the Bone adapter (`boneconv convert --to
peft-lora`); see axolotl_merge.py for what it needs.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import boneconv

sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import SIZES, make
from plots import save, subplots
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
            "{lora}": str(folder / "lora"),
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
_PEFT = (sys.executable, "-W", "ignore", str(HERE / "peft_merge.py"))
PEFT = Tool("PEFT 0.18.1", (*_PEFT, "{base}", "{adapter}", "{out}"))
_AXOLOTL = (sys.executable, "-W", "ignore", str(HERE / "axolotl_merge.py"))
AXOLOTL = Tool("axolotl 0.19.0, as LoRA", (*_AXOLOTL, "{base}", "{lora}", "{out}"))


@dataclass(frozen=True)
class Result:
    """What was measured with one checkpoint and variant.

    Attributes:
        size: A name of `SIZES`.
        variant: ``bone`` or ``bat``.
        times: The rounds of each tool.
        memory: The peak of some tools.
    """

    size: str
    variant: str
    times: dict[str, list[Timing]]
    memory: dict[str, Memory]

    def ratio(self, tool: str, to: Tool) -> float:
        """The median of the ratios of wall clock taken round by round."""
        pairs = zip(self.times[tool], self.times[to.name], strict=True)
        return statistics.median(one.wall / other.wall for one, other in pairs)

    def wall(self, tool: str) -> float:
        """The median wall clock, in seconds."""
        return statistics.median(run.wall for run in self.times[tool])

    def rows(self) -> list[str]:
        """The table's rows."""
        return [self._row(name) for name in self.times]

    def _row(self, name: str) -> str:
        cpu = statistics.median(run.cpu for run in self.times[name])
        used = self.memory.get(name)
        cells = [name, *(f"{figure:.2f}" for figure in (self.wall(name), cpu))]
        cells += [f"{self.ratio(name, copying):.2f}" for copying in (CP, CP_SYNC)]
        cells += [f"{n / 1e6:.0f}" for n in (used.resident, used.anonymous)] if used else ["-", "-"]
        return f"| {' | '.join(cells)} |"


def measure(
    folder: Path, variant: str, tools: Iterable[Tool], rounds: int
) -> dict[str, list[Timing]]:
    """Times every tool in turn, ``rounds`` times, after a round that does not count."""
    times: dict[str, list[Timing]] = {tool.name: [] for tool in tools}
    for number in range(rounds + 1):
        for tool in tools:
            _clear(folder)
            _warm(folder)
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


def _clear(folder: Path) -> None:
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(folder / "out.partial", ignore_errors=True)
    os.sync()


def _warm(folder: Path) -> None:
    """Copies the base and removes the copy: base and page cache are then in the machine's memory.

    A virtual machine's host takes back what is free, and lets the next one wait for it.
    """
    spare = folder / "spare"
    subprocess.run(["cp", "-r", folder / "base", spare], check=True)
    shutil.rmtree(spare)
    os.sync()


def prepare(folder: Path, size: str) -> None:
    """Makes the checkpoint and its adapters where they are missing."""
    if not (folder / "bat" / "adapter_config.json").is_file():
        make(folder, SIZES[size])
    if not (folder / "lora").is_dir():
        boneconv.convert(folder / "bone", folder / "lora", to="peft-lora", base=folder / "base")


def load(path: Path | None) -> dict[tuple[str, str], Result]:
    """The results of earlier runs."""
    if path is None or not path.is_file():
        return {}
    found = {}
    for entry in json.loads(path.read_text()):
        times = {name: [Timing(**run) for run in runs] for name, runs in entry["times"].items()}
        memory = {name: Memory(**used) for name, used in entry["memory"].items()}
        key = entry["size"], entry["variant"]
        found[key] = Result(*key, times, memory)
    return found


def draw(results: Sequence[Result], path: Path) -> None:
    """Time and memory against the checkpoint's size, every tool a line."""
    figure, (left, right) = subplots(2, (10, 4))
    sizes = sorted({SIZES[result.size].parameters / 1e9 for result in results})
    for number, (label, points) in enumerate(_lines(results).items()):
        style = {"marker": "o", "label": label, "color": f"C{number}"}
        left.plot(*zip(*((size, wall) for size, wall, _ in points), strict=True), **style)
        used = [(size, memory.resident / 1e6) for size, _, memory in points if memory]
        if used:
            right.plot(*zip(*used, strict=True), **style)
    for axis, name in ((left, "seconds"), (right, "peak memory, MB")):
        axis.set(xscale="log", yscale="log", xlabel="parameters, billions", ylabel=name)
        axis.minorticks_off()
        axis.set_xticks(sizes, [f"{size:.1f}" for size in sizes])
        axis.grid(alpha=0.3)
    left.legend(fontsize="small")
    save(figure, path)


def _lines(results: Sequence[Result]) -> dict[str, list[tuple[float, float, Memory | None]]]:
    """Size, time and memory of every tool, in the order of the results."""
    lines: dict[str, list[tuple[float, float, Memory | None]]] = {}
    for result in results:
        for name in result.times:
            label = _label(name, result.variant)
            if label:
                size = SIZES[result.size].parameters / 1e9
                point = size, result.wall(name), result.memory.get(name)
                lines.setdefault(label, []).append(point)
    return lines


def _label(tool: str, variant: str) -> str:
    """A line's label; empty for what is not drawn."""
    if tool in (MERGE.name, PEFT.name):
        return f"{tool}, {'Bone' if variant == 'bone' else 'BAT'}"
    return "" if tool.startswith("-") or variant == "bat" else tool


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1b"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-parts", action="store_true", help="nothing with parts switched off")
    parser.add_argument("--peft", action="store_true", help="PEFT too (needs the model's memory)")
    parser.add_argument("--axolotl", action="store_true", help="axolotl too, for Bone")
    parser.add_argument(
        "--results", type=Path, help="a file to read earlier results from, and keep"
    )
    parser.add_argument("--plot", type=Path, help="an .svg or .png")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores")
    compileall.compile_dir(Path(boneconv.__file__).parent, quiet=1)  # as an installer does
    results = load(options.results)
    for size in options.sizes:
        folder = options.folder / size
        prepare(folder, size)
        for variant in ("bone", "bat"):
            tools = [CP, CP_SYNC, MERGE]
            tools += [] if options.no_parts else [NO_FLUSH, NO_DIGESTS, PLAIN]
            tools += [PEFT] if options.peft else []
            tools += [AXOLOTL] if options.axolotl and variant == "bone" else []
            times = measure(folder, variant, tools, options.rounds)
            measured = [tool for tool in tools if tool in (MERGE, PEFT, AXOLOTL)]
            memory = {tool.name: peak(folder, variant, tool) for tool in measured}
            found = results[size, variant] = Result(size, variant, times, memory)
            print(f"\n### {size}, {variant}\n")
            print("| | wall s | CPU s | wall / cp | wall / (cp; sync) | peak MB | anonymous MB |")
            print("| --- | --- | --- | --- | --- | --- | --- |")
            print("\n".join(found.rows()), flush=True)
    ordered = sorted(results.values(), key=lambda result: SIZES[result.size].parameters)
    if options.results:
        options.results.write_text(json.dumps([asdict(result) for result in ordered], indent=1))
    if options.plot:
        draw(ordered, options.plot)


if __name__ == "__main__":
    main()
