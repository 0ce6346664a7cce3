"""``boneconv merge``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from boneconv.cli import options
from boneconv.cli.console import Bar, echo_json, note, one_line, size, table

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from boneconv.merging import MergeResult
    from boneconv.planning import MergePlan

__all__ = ["command"]


@click.command("merge", short_help="Merge an adapter into a checkpoint.")
@click.argument("base")
@click.argument("adapter")
@click.argument("out", type=click.Path())
@options.more_adapters(
    "A further adapter, applied after the first; with --component, NAME=PATH for another "
    "component. May be repeated.",
    "[NAME=]MORE",
)
@click.option(
    "--component",
    metavar="NAME",
    help="BASE is a diffusers pipeline: merge ADAPTER into this component of it, such as unet; "
    "all else of it is copied.",
)
@click.option(
    "--each",
    "each",
    multiple=True,
    metavar="ADAPTER=OUT",
    help="A further output from one more adapter, in the same pass; may be repeated.",
)
@click.option(
    "--scale",
    type=float,
    default=1.0,
    show_default=True,
    metavar="S",
    help="Strength: W + S (W' - W).",
)
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="Dtype of every floating tensor of OUT; with --component, of the merged components.",
)
@click.option(
    "--max-shard-size", metavar="SIZE", help="Such as 5GB; by default OUT has the base's files."
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="cpu|cuda",
    help="Where to compute; the bytes are the same.",
)
@options.workers
@click.option(
    "--scheduler",
    metavar="tcp://...",
    help="Compute on a Dask cluster that sees the same files, by the same paths.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done, from headers alone.")
@click.option(
    "--no-card", is_flag=True, help="Keep the base's README.md instead of writing a model card."
)
@options.allow_base_mismatch
@click.option(
    "--keep-delta",
    metavar="FILE",
    help="Keep in FILE what `boneconv unmerge` needs to restore the base's every byte.",
)
@click.option(
    "--verify",
    "verified",
    is_flag=True,
    help="Verify OUT before it is published; if that fails, nothing is, and the exit code is 1.",
)
@options.force
@options.as_json()
@options.quiet
@options.verbose("every tensor of a dry run")
def command(
    base: str,
    adapter: str,
    out: str,
    more: tuple[str, ...],
    component: str | None,
    each: tuple[str, ...],
    scale: float,
    dtype: str,
    max_shard_size: str | None,
    device: str,
    workers: int | None,
    scheduler: str | None,
    dry_run: bool,
    no_card: bool,
    allow_base_mismatch: bool,
    keep_delta: str | None,
    verified: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Merge ADAPTER into BASE and write the result to OUT.

    BASE and ADAPTER are folders, files or Hub ids (owner/name[@revision]). OUT is a folder for a
    folder and a .safetensors or .pth file for a file; it appears whole or not at all. With
    --component, BASE and OUT are diffusers pipelines.

    Example: boneconv merge ./SmolLM2-135M ./my-bone-adapter ./merged
    """
    from boneconv.merging import merge
    from boneconv.planning import plan_merge

    pairs = [_pair(text) for text in each]
    more, components = options.by_component(component, more)
    settings: dict[str, Any] = {
        "component": component,
        "scale": scale,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "workers": workers,
        "card": not no_card,
    }
    if dry_run:
        plans = [plan_merge(base, adapter, more=more, components=components, **settings)]
        plans += [plan_merge(base, one, **settings) for one, _ in pairs]
        if as_json:
            first, *others = map(_plan_json, plans)
            echo_json(first | ({"each": others} if others else {}))
        else:
            click.echo("\n\n".join(_plan_text(plan, verbose) for plan in plans))
        return
    check = None
    if verified:
        from boneconv.cli.verified import Adapters, MergeCheck

        outputs = [Adapters(adapter, more, components)]
        outputs += [Adapters(one) for one, _ in pairs]
        check = MergeCheck(
            base,
            outputs,
            component=component,
            scale=scale,
            dtype=dtype,
            allow_base_mismatch=allow_base_mismatch,
            workers=workers,
            quiet=quiet,
        )
    bar = Bar("merging", quiet=quiet)
    try:
        with _executor(scheduler) as executor:
            result = merge(
                base,
                adapter,
                out,
                more=more,
                each=pairs,
                components=components,
                device=device,
                executor=executor,
                allow_base_mismatch=allow_base_mismatch,
                keep_delta=keep_delta,
                check=check,
                force=force,
                progress=bar,
                **settings,
            )
    finally:
        bar.close()
    for one in (result, *result.each):
        for text in one.notes:
            note(text, quiet=quiet)
    if as_json:
        others = [_result_json(one) for one in result.each]
        found = {} if check is None else {"verified": check.verdicts}
        echo_json(_result_json(result) | found | ({"each": others} if others else {}))
    else:
        click.echo("\n".join(map(_result_text, (result, *result.each))))


def _pair(text: str) -> tuple[str, str]:
    adapter, separator, out = text.rpartition("=")
    if not separator or not adapter or not out:
        raise click.UsageError(f"--each takes ADAPTER=OUT, not {one_line(text)}")
    return adapter, out


@contextmanager
def _executor(scheduler: str | None) -> Iterator[Executor | None]:
    if scheduler is None:
        yield None
        return
    from boneconv.engine.cluster import cluster

    with cluster(scheduler) as executor:
        yield executor


def _result_json(result: MergeResult) -> dict[str, Any]:
    return {
        "out": str(result.out),
        "record": str(result.record),
        "tensors": result.counts,
        "bytes": result.nbytes,
        "left_out": list(result.left_out),
        "notes": list(result.notes),
        "delta": None if result.delta is None else str(result.delta),
    }


def _result_text(result: MergeResult) -> str:
    return f"{result.out}: {_counts(result.counts)}, {size(result.nbytes)}"


def _plan_json(plan: MergePlan) -> dict[str, Any]:
    return {
        "tensors": plan.counts,
        "bytes": plan.plan.total_bytes,
        "peak_memory": plan.peak_memory,
        "files": [shard.name for shard in plan.plan.shards],
        "copies": [str(path) for path in plan.plan.copies],
        "left_out": [str(path) for path in plan.plan.left_out],
        "matched_by": plan.matched_by,
        "notes": list(plan.notes),
        "plan": [
            {
                "name": name,
                "action": str(tensor.action),
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
            }
            for name, tensor in plan.plan.named.items()
        ],
    }


def _plan_text(plan: MergePlan, verbose: bool) -> str:
    lines = [
        f"tensors      {_counts(plan.counts)}",
        f"names        matched by {', '.join(plan.matched_by)}",
        f"disk         {size(plan.plan.total_bytes)}",
        f"peak memory  about {size(plan.peak_memory)}",
        f"files        {len(plan.plan.shards)} of weights, {len(plan.plan.copies)} copied, "
        f"{len(plan.plan.texts)} written",
        *(f"note         {one_line(text)}" for text in plan.notes),
    ]
    if verbose:
        rows = [("action", "tensor", "dtype", "shape")]
        rows += [
            (str(t.action), name, t.dtype, "x".join(map(str, t.shape)) or "scalar")
            for name, t in plan.plan.named.items()
        ]
        lines += ["", table(rows)]
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    words = {
        "merge": "merged",
        "replace": "replaced",
        "add": "added",
        "cast": "cast",
        "copy": "copied",
    }
    return ", ".join(f"{counts[key]} {word}" for key, word in words.items() if counts[key])
