"""What the merge's arithmetic costs: nanoseconds a weight, and how many elements stay in doubt.

    OPENBLAS_NUM_THREADS=1 python benchmarks/kernels.py [--rank 64] [--columns 2048] [--quick]

Each case merges one cache-sized chunk over and over; the figure is the fastest run (and the
median), so that other work on the machine disturbs it little. "plain" is the merge without
exactness: float32 accumulation and one rounding (float64 for float32 targets). "2 threads" runs the
canonical merge in two threads at once and gives the median time a weight per thread; where it
equals that of one thread, the threads do not hinder each other.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from boneconv.config import Axis, Variant
from boneconv.dtypes import BF16, F16, F32, name_of
from boneconv.kernels import RowMerger, Scratch, Stage, bat

VARIANTS = [
    ("bone", Variant.BONE, Axis.OUT),
    ("mini", Variant.MINI, Axis.OUT),
    ("bat out", Variant.BAT, Axis.OUT),
    ("bat in", Variant.BAT, Axis.IN),
]
DTYPES = [
    (BF16, BF16, F32),
    (BF16, BF16, BF16),
    (F16, F16, F32),
    (F32, F32, F32),
    (F32, BF16, F32),
    (BF16, F32, F32),
]


def times(run: Callable[[], None], seconds: float) -> tuple[float, float]:
    """The fastest and the median duration of a run."""
    run()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 5:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken), statistics.median(taken)


def in_two_threads(make: Callable[[], Callable[[], None]], seconds: float) -> float:
    """The median duration of a run while another thread does the same."""
    results: list[float] = []

    def work(run: Callable[[], None]) -> None:
        results.append(times(run, seconds)[1])

    threads = [threading.Thread(target=work, args=(make(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.mean(results)


class Doubts:
    """Counts what the first test of a BAT merge leaves in doubt."""

    def __init__(self) -> None:
        self.elements = 0
        self._original = bat.Recheck.settle

    def __enter__(self) -> Doubts:
        def settle(recheck: Any, rows: Any, first_row: int, where: Any, *rest: Any) -> None:
            self.elements += len(where)
            self._original(recheck, rows, first_row, where, *rest)

        bat.Recheck.settle = settle  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        bat.Recheck.settle = self._original  # type: ignore[method-assign]


def case(
    variant: Variant, axis: Axis, dtypes: tuple[Any, Any, Any], rank: int, columns: int
) -> tuple[Any, Stage]:
    """A chunk of weights and a block, sized like a trained adapter's."""
    rng = np.random.default_rng(0)
    source, _, block_dtype = dtypes
    rows = max(rank, (1 << 17) // columns // rank * rank)
    blocks = (rows if axis is Axis.OUT else columns) // rank
    shapes = {Variant.BONE: (rank, rows), Variant.MINI: (rank, rank)}
    shape = shapes.get(variant, (blocks, rank, rank))
    block = (rng.standard_normal(shape) * 0.01).astype(block_dtype)
    weight = (rng.standard_normal((rows, columns)) * 0.02).astype(source)
    return weight, Stage(variant, block, axis)


def runner(merger: RowMerger, weight: Any, target: Any) -> Callable[[], None]:
    """Merges the chunk once, into buffers of its own."""
    out, scratch = np.empty(weight.shape, target), Scratch()
    return lambda: merger.merge(weight, 0, out, scratch)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--quick", action="store_true", help="0.1 s a figure instead of 0.5 s")
    options = parser.parse_args()
    seconds = 0.1 if options.quick else 0.5
    print(f"r = {options.rank}, in = {options.columns}; ns a weight: fastest (median)")
    print(f"{'':9}{'weight':>7}{'block':>7}{'out':>7}{'canonical':>16}{'2 threads':>11}", end="")
    print(f"{'plain':>16}{'in doubt':>10}{'plain misrounds':>17}")
    for name, variant, axis in VARIANTS:
        for dtypes in DTYPES:
            report(name, variant, axis, dtypes, options, seconds)


def report(
    name: str,
    variant: Variant,
    axis: Axis,
    dtypes: Any,
    options: argparse.Namespace,
    seconds: float,
) -> None:
    """Print one line."""
    source, target, block = dtypes
    weight, stage = case(variant, axis, dtypes, options.rank, options.columns)
    ns = 1e9 / weight.size
    found = []
    columns = []
    for canonical in (True, False):
        merger = RowMerger([stage], weight.shape, source, target, canonical=canonical)
        fastest, median = times(runner(merger, weight, target), seconds)
        columns.append(f"{fastest * ns:.2f} ({median * ns:.2f})")
        out = np.empty(weight.shape, target)
        merger.merge(weight, 0, out, Scratch())
        found.append(out.view(f"u{target.itemsize}"))
        if canonical:
            both = in_two_threads(lambda m=merger: runner(m, weight, target), seconds)  # type: ignore[misc]
            columns.append(f"{both * ns:.2f}")
            with Doubts() as doubts:
                merger.merge(weight, 0, out, Scratch())
    wrong = float((found[0] != found[1]).mean())
    print(
        f"{name:9}{name_of(source):>7}{name_of(block):>7}{name_of(target):>7}"
        f"{columns[0]:>16}{columns[1]:>11}{columns[2]:>16}"
        f"{doubts.elements / weight.size:>10.3%}{wrong:>17.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
