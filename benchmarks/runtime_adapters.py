"""What adapters that are swapped at run time cost: milliseconds a pass, beside the plain graph.

    python benchmarks/runtime_adapters.py BASE GRAPH BONE [BAT] [--tokens 1 32 256] [--seconds 4]

The sessions take turns, so that other work on the machine disturbs all alike; the ratio is the
median over the rounds of each to the plain graph of the same round, and that of the fastest passes,
which other work disturbs least. "none" is the graph with adapter inputs and no adapter, "ragged"
the Bone adapter cut to rank 50, "lora" the Bone adapter as ONNX Runtime's own LoraAdapter, for
comparison with what `AdapterSession` does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path = [path for path in sys.path if Path(path or ".").resolve() != HERE]  # not onnx.py here

import onnxruntime  # noqa: E402

from boneconv.adapter import Adapter  # noqa: E402
from boneconv.formats import read_adapter  # noqa: E402
from boneconv.io.checkpoint import open_checkpoint  # noqa: E402
from boneconv.io.safetensors import ArrayTensor  # noqa: E402
from boneconv.onnx.runtime.export import export_runtime_adapters  # noqa: E402
from boneconv.onnx.runtime.session import AdapterSession  # noqa: E402
from boneconv.planning.accounts import Strength  # noqa: E402

THREADS = 2
RAGGED = 50


def main() -> None:
    """Exports, then times."""
    given = arguments()
    bone = read_adapter(given.bone)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = {"plain": plain(given.graph)}
        runs |= swapped(given, folder / "bone", {"bone": bone, "ragged": cut(bone, RAGGED)}, "")
        if given.bat is not None:
            bat = read_adapter(given.bat)
            runs |= swapped(given, folder / "bat", {"bat": bat}, ", BAT's graph")
        for tokens in given.tokens:
            report(tokens, measure(runs, tokens, given.seconds))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("graph", type=Path, help="the base's graph, a file")
    parser.add_argument("bone", type=Path)
    parser.add_argument("bat", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case and length")
    return parser.parse_args()


def cut(adapter: Adapter, rank: int) -> Adapter:
    """The first rows of every block, as an adapter of that rank."""
    blocks = {
        name: replace(
            block, rank=rank, tensor=ArrayTensor(name, np.array(block.tensor.read()[:rank]))
        )
        for name, block in adapter.blocks.items()
    }
    return replace(adapter, blocks=blocks)


Run = Callable[[int], Any]


def options() -> onnxruntime.SessionOptions:
    """Two threads that do not spin."""
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = THREADS
    made.log_severity_level = 3
    made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return made


def plain(graph: Path) -> Run:
    """A pass of the base's own graph."""
    session = onnxruntime.InferenceSession(graph, options(), providers=["CPUExecutionProvider"])
    return lambda tokens: session.run(["logits"], feeds(session, tokens))


def swapped(
    given: argparse.Namespace, out: Path, adapters: dict[str, Adapter], label: str
) -> dict[str, Run]:
    """Passes of the graph with adapter inputs: without, and with each adapter."""
    out.mkdir()
    strengths = {name: Strength(adapter) for name, adapter in adapters.items()}
    base = open_checkpoint(given.base)
    summary = export_runtime_adapters(base, strengths, given.graph, out, bat="activation")
    session = AdapterSession(summary.graph, session_options=options())
    for name, path in summary.adapters.items():
        session.load(name, path)

    def run(name: str | None) -> Run:
        return lambda tokens: session.run(["logits"], feeds(session.session, tokens), name)

    runs = {f"none{label}": run(None)} | {name: run(name) for name in adapters}
    if "bone" in adapters:
        runs["lora"] = own(session.session, summary.adapters["bone"])
    return runs


def own(session: onnxruntime.InferenceSession, path: Path) -> Run:
    """A pass with an adapter as ONNX Runtime itself loads it."""
    adapter, active = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(path))
    active.add_active_adapter(adapter)
    kept = [adapter]

    def run(tokens: int) -> Any:
        assert kept
        return session.run(["logits"], feeds(session, tokens), active)

    return run


def feeds(session: onnxruntime.InferenceSession, tokens: int) -> dict[str, Any]:
    """Random tokens and an empty past."""
    found: dict[str, Any] = {}
    for given in session.get_inputs():
        if given.name == "input_ids":
            found[given.name] = np.random.default_rng(0).integers(5, 40_000, (1, tokens))
        elif given.name == "attention_mask":
            found[given.name] = np.ones((1, tokens), np.int64)
        elif given.name == "position_ids":
            found[given.name] = np.arange(tokens)[None]
        else:
            sizes = [size if isinstance(size, int) else None for size in given.shape]
            heads, width = sizes[1] or 3, sizes[3] or 64
            found[given.name] = np.zeros((1, heads, 0, width), np.float32)
    return found


def measure(runs: dict[str, Run], tokens: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of every pass, round by round."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(tokens)
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end or len(taken["plain"]) < 5:
        for name, run in runs.items():
            start = time.perf_counter()
            run(tokens)
            taken[name].append(time.perf_counter() - start)
    return taken


def report(tokens: int, taken: dict[str, list[float]]) -> None:
    """One line a case."""
    print(f"\n{tokens} tokens, {len(taken['plain'])} rounds")
    for name, times in taken.items():
        ratios = [time / base for time, base in zip(times, taken["plain"], strict=True)]
        middle, fastest = 1e3 * statistics.median(times), 1e3 * min(times)
        ratio, best = statistics.median(ratios), min(times) / min(taken["plain"])
        print(
            f"  {name:20} median {middle:8.1f} ms  x {ratio:.2f}"
            f"   fastest {fastest:8.1f} ms  x {best:.2f}"
        )


if __name__ == "__main__":
    main()
