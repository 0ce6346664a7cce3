"""A layer's forward and training step against PEFT 0.18.1 and a plain torch.nn.Linear.

    python benchmarks/forward.py [--sizes 2048 4096] [--tokens 1 16 512] [--rank 64] [--threads 1]
                                 [--axis out] [--dtype float32] [--device cpu] [--seconds 2]

Prints two markdown tables, row by row. "plain" is a frozen nn.Linear of the same shape, which is
what a merged layer is; every time is a ratio to its. The contenders of a case take turns, call by
call, so that other work on the machine falls on all of them; a ratio is the median of the ratios of
each turn to plain's call in the same turn, with the ratio of the CPU seconds after it
("1.02 / 1.01").

A training step is forward and backward, with gradients of x and of the block (plain: of x); the
gradient of y is a tensor of its own, as what follows a layer hands it back. "floor"
is what the matrix products alone demand, in multiplications relative to plain's: forward T + r for
BAT (2 T where r > T), backward 2 T + 2 r (3 T), against T and T.

Memory is what torch's allocator hands out, as the profiler records it: every allocation of every
kernel, to the byte, the same each time. (The process's resident memory also holds what malloc and
the BLAS keep, and changes from run to run.) "peak" is the most above idle in one step, "kept" what
autograd holds between forward and backward beyond x and y.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from boneconv.config import Axis, Variant
from boneconv.nn import BoneLinear

TURNS = 5  # at least
TIME = ["time (wall / CPU)", "floor"]


@dataclass(frozen=True)
class Contender:
    """A layer and its name in the table."""

    name: str
    layer: nn.Module


def plain(size: int, options: argparse.Namespace) -> nn.Linear:
    """A frozen linear layer; the same weight for every contender of a case."""
    torch.manual_seed(0)
    layer = nn.Linear(size, size, dtype=options.dtype, device=options.device)
    return layer.requires_grad_(False).eval()


def ours(size: int, options: argparse.Namespace, variant: Variant, *, cached: bool) -> BoneLinear:
    """Our layer with a random block."""
    layer = BoneLinear(plain(size, options))
    layer.add_adapter("default", r=options.rank, variant=variant, axis=options.axis)
    layer.set_adapter("default")
    fill(layer.bone_block["default"])
    layer.cache_weight = cached
    return layer.eval()


def theirs(size: int, options: argparse.Namespace, variant: Variant) -> nn.Module:
    """PEFT's layer with the same block."""
    from peft.tuners.bone.layer import BoneLinear as PeftLinear

    init = "bat" if variant is Variant.BAT else True
    layer = PeftLinear(plain(size, options), "default", r=options.rank, init_weights=init)
    fill(layer.bone_block["default"])
    return layer.eval()


def fill(block: Tensor) -> None:
    """Numbers like a trained adapter's."""
    torch.manual_seed(1)
    with torch.no_grad():
        block.normal_(std=0.01)


def contenders(size: int, options: argparse.Namespace) -> list[Contender]:
    """All layers of one size; PEFT has no BAT over the input axis."""
    found = [Contender("plain", plain(size, options))]
    for variant in options.only:
        if options.peft and (variant is Variant.BONE or options.axis is Axis.OUT):
            found.append(Contender(f"{variant} PEFT", theirs(size, options, variant)))
        found.append(Contender(f"{variant}", ours(size, options, variant, cached=False)))
        found.append(Contender(f"{variant} cached", ours(size, options, variant, cached=True)))
    return found


@dataclass
class Times:
    """Wall and CPU seconds of each turn."""

    wall: list[float]
    cpu: list[float]


def measure(calls: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, Times]:
    """Let the calls take turns for some seconds."""
    found = {name: Times([], []) for name in calls}
    for call in calls.values():
        call()
        call()
    end = time.perf_counter() + options.seconds * len(calls)
    while len(found["plain"].wall) < TURNS or time.perf_counter() < end:
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            settle(options)
            found[name].cpu.append(time.process_time() - cpu)
            found[name].wall.append(time.perf_counter() - wall)
    return found


def settle(options: argparse.Namespace) -> None:
    """Wait for an accelerator to finish."""
    if options.device.type != "cpu":
        torch.accelerator.synchronize(options.device)


def forward(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """A call in eval mode without gradients."""

    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward in training mode, with gradients of x and of what is trainable."""
    x = x.clone().requires_grad_()
    layer.train()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def call() -> None:
        y = layer(x)
        torch.autograd.grad(y, wanted, torch.ones_like(y))

    return call


def ratios(times: Times, base: Times) -> str:
    """Median of the turns' ratios, wall / CPU."""
    wall = statistics.median(a / b for a, b in zip(times.wall, base.wall, strict=True))
    cpu = statistics.median(times.cpu) / max(1e-9, statistics.median(base.cpu))
    return f"{wall:.2f} / {cpu:.2f}"


def floor(name: str, tokens: int, rank: int, *, train: bool) -> float:
    """The matrix products' share of a call, relative to plain's."""
    if not name.startswith("bat") or "cached" in name:
        return 1.0
    there = min(tokens + rank, 2 * tokens)
    back = min(2 * tokens + 2 * rank, 3 * tokens)
    return (there + back) / (2 * tokens) if train else there / tokens


def allocations(run: Callable[[], Any]) -> tuple[int, int, Any]:
    """The peak above the start and the balance at the end, in bytes, and what ``run`` returned."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, held, result


def memory(layer: nn.Module, x: Tensor) -> tuple[int, int]:
    """Peak of a training step above idle, and what is kept beyond x and y, in bytes."""
    call = step(layer, x)
    call()
    peak, _, _ = allocations(call)
    tracked = x.clone().requires_grad_()
    _, kept, y = allocations(lambda: layer(tracked))
    return peak, kept - y.numel() * y.element_size()


def header(title: str, columns: list[str]) -> None:
    """The head of a markdown table."""
    print(f"\n{title}\n")
    row(columns)
    print("|" + "---|" * len(columns))


def row(cells: list[str]) -> None:
    """A row of a markdown table, printed as soon as it is known."""
    print("| " + " | ".join(cells) + " |", flush=True)


def inputs(options: argparse.Namespace) -> Iterator[tuple[int, Tensor]]:
    """Every size with every number of tokens."""
    for size in options.sizes:
        for tokens in options.tokens:
            torch.manual_seed(2)
            yield size, torch.randn(tokens, size, dtype=options.dtype, device=options.device)


def shown(name: str, found: dict[str, Times]) -> str:
    """Plain's time in milliseconds; the others' as ratios to it."""
    plain_times = found["plain"]
    if name == "plain":
        return f"{statistics.median(plain_times.wall) * 1e3:.2f} ms"
    return ratios(found[name], plain_times)


def forwards(options: argparse.Namespace) -> None:
    """Print the first table."""
    header("Forward, without gradients", ["in = out", "tokens", "layer", *TIME])
    for size, x in inputs(options):
        layers = contenders(size, options)
        found = measure({c.name: forward(c.layer.eval(), x) for c in layers}, options)
        for c in layers:
            limit = floor(c.name, len(x), options.rank, train=False)
            row([str(size), str(len(x)), c.name, shown(c.name, found), f"{limit:.2f}"])


def training(options: argparse.Namespace) -> None:
    """Print the second table; memory on the CPU alone, where the profiler sees every allocation."""
    columns = ["in = out", "tokens", "layer", *TIME, "peak (ratio)", "kept"]
    header("Training step", columns)
    for size, x in inputs(options):
        layers = [c for c in contenders(size, options) if "cached" not in c.name]
        found = measure({c.name: step(c.layer, x) for c in layers}, options)
        used = {}
        if options.device.type == "cpu":
            used = {c.name: memory(c.layer, x) for c in layers}
        for c in layers:
            limit = floor(c.name, len(x), options.rank, train=True)
            cells = [str(size), str(len(x)), c.name, shown(c.name, found), f"{limit:.2f}"]
            if used:
                peak, kept = used[c.name]
                base = used["plain"][0]
                cells += [f"{peak / 2**20:.2f} MiB ({peak / base:.2f})", f"{kept / 2**20:.2f} MiB"]
            row(cells)


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096], help="in = out")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--axis", type=Axis, choices=list(Axis), default=Axis.OUT)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, ...")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seconds", type=float, default=2.0, help="per contender and case")
    parser.add_argument(
        "--only",
        type=Variant,
        nargs="+",
        choices=[Variant.BONE, Variant.BAT],
        default=[Variant.BONE, Variant.BAT],
    )
    parser.add_argument("--no-peft", dest="peft", action="store_false", help="leave PEFT out")
    parser.add_argument(
        "--what", choices=["forward", "step", "both"], default="both", help="which tables"
    )
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype)
    torch.set_num_threads(options.threads)
    if options.what != "step":
        forwards(options)
    if options.what != "forward":
        training(options)


if __name__ == "__main__":
    main()
