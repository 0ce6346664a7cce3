"""Patching a graph of SmolLM2-135M against tracing the merged model, side by side.

    python benchmarks/onnx.py [--kinds torch exporter genai-fp32] [--rounds 3]

Every export runs in a process of its own and says how long it took and how much memory it had. The
load in ONNX Runtime that ends a patch happens in yet another process and counts for the time, not
for the memory. Graphs and adapters are those of the tests, made once per machine. Prints the table
that RESULTS.md holds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path = [path for path in sys.path if Path(path or ".").resolve() != HERE]  # not the onnx here
sys.path.insert(0, str(HERE.parent))

KINDS = ("torch", "torch-optimized", "exporter", "exporter-fused", "genai-fp32", "genai-fp16")
ALLOWANCE = 150e6

CHILD = """
import json, pathlib, re, resource, sys, time
start = time.perf_counter()
from boneconv import export_onnx
base, adapter, out, graph = sys.argv[1:]
export_onnx(base, adapter, out, graph=graph or None)
wall = time.perf_counter() - start
own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
cpu = own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime
status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss counts the parent's too
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) * 1024
print(json.dumps({"seconds": wall, "cpu": cpu, "bytes": peak}))
"""


def export(base: Path, adapter: Path, graph: Path | None) -> dict[str, float]:
    """Exports once in a process of its own: seconds, CPU seconds, bytes of its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(base), str(adapter), f"{folder}/out", str(graph or "")]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CHILD, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
            cwd=HERE.parent,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(
    name: str, runs: list[dict[str, float]], traced: dict[str, float], bound: float | None
) -> str:
    """A table row: medians, how many times faster than tracing, peak memory and its bound."""
    seconds, cpu = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu"))
    ratios = f"{traced['seconds'] / seconds:.0f} | {traced['cpu'] / cpu:.0f}"
    peak = max(run["bytes"] for run in runs)
    allowed = "-" if bound is None else f"{bound / 1e6:.0f}"
    return f"| {name} | {seconds:.2f} | {cpu:.2f} | {ratios} | {peak / 1e6:.0f} | {allowed} |"


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["exporter", "genai-fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from boneconv.graphs import open_graph
    from tests.oracle import real
    from tests.oracle.cache import default_cache
    from tests.oracle.graphs import smollm2_graph

    cache = default_cache()
    base = real.smollm2(cache)
    graphs: dict[str, Any] = {kind: smollm2_graph(cache, kind) for kind in options.kinds}
    for variant in ("bone", "bat"):
        adapter = real.trained(cache, variant)
        traced = export(base, adapter, None)
        print(f"\n### SmolLM2-135M, {variant}\n")
        print("| | wall s | CPU s | times faster | by CPU | peak MB | largest x 4 + 150 MB |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        print(row("traced", [traced], traced, None), flush=True)
        for kind, graph in graphs.items():
            bound = 4 * open_graph(graph).largest + ALLOWANCE
            runs = [export(base, adapter, graph) for _ in range(options.rounds + 1)][1:]
            print(row(f"patched: {kind}", runs, traced, bound), flush=True)


if __name__ == "__main__":
    main()
