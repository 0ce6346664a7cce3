"""``boneconv convert``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from boneconv.cli import options
from boneconv.cli.console import Bar, echo_json, note, table

if TYPE_CHECKING:
    from boneconv.conversion import ConvertResult

__all__ = ["command"]

_TARGETS = ("native", "peft-bone", "peft-miss", "peft-lora", "rwkv")


@click.command("convert", short_help="Convert an adapter to another format.")
@click.argument("adapter")
@click.argument("out", type=click.Path())
@click.option(
    "--to",
    required=True,
    type=click.Choice(_TARGETS),
    help="native: Bone Adapter Format 1.0. peft-bone: PEFT 0.14 to 0.18. peft-miss: PEFT 0.17 and "
    "later. peft-lora: any PEFT, vLLM, llama.cpp. rwkv: RWKV-PEFT.",
)
@click.option(
    "--base",
    metavar="BASE",
    help="The base of the adapter: needed for peft-lora (for Bone and mini its config.json is "
    "enough); with native, its fingerprint is recorded.",
)
@click.option("--rank", type=click.IntRange(min=1), metavar="K", help="Rank of BAT's LoRA.")
@click.option(
    "--energy",
    type=float,
    metavar="E",
    help="In place of --rank: the share of the squared singular values that every module of BAT's "
    "LoRA retains, such as 0.99.",
)
@click.option(
    "--max-error",
    type=float,
    default=0.05,
    show_default=True,
    metavar="X",
    help="Largest |dW - BA| / |dW| of a module of BAT's LoRA; above it the exit code is 1.",
)
@click.option("--allow-error", is_flag=True, help="Write the LoRA whatever its error.")
@click.option(
    "--pad-rank",
    is_flag=True,
    help="Raise the LoRA's rank to one that vLLM serves: 8, 16, 32, 64, 128, 256, 320, 512.",
)
@options.force
@options.as_json()
@options.quiet
@options.verbose("the error of every module")
def command(
    adapter: str,
    out: str,
    to: str,
    base: str | None,
    rank: int | None,
    energy: float | None,
    max_error: float,
    allow_error: bool,
    pad_rank: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Convert ADAPTER to another format and write the result to OUT.

    ADAPTER is a folder, a file (.pth of RWKV-PEFT) or a Hub id (owner/name[@revision]). OUT is a
    folder; for rwkv a .pth file; for native a folder or a .safetensors file. What was written is
    read back and compared before it appears.

    Example: boneconv convert ./my-bone-adapter ./my-miss-adapter --to peft-miss
    """
    from boneconv.conversion import convert

    bar = Bar("converting", quiet=quiet)
    try:
        result = convert(
            adapter,
            out,
            to=to,
            base=base,
            rank=rank,
            energy=energy,
            max_error=max_error,
            allow_error=allow_error,
            pad_rank=pad_rank,
            force=force,
            progress=bar,
        )
    finally:
        bar.close()
    for text in result.notes:
        note(text, quiet=quiet)
    echo_json(_json(result)) if as_json else click.echo(_text(result, verbose=verbose))


def _json(result: ConvertResult) -> dict[str, Any]:
    return {
        "out": str(result.out),
        "to": str(result.to),
        "record": None if result.record is None else str(result.record),
        "rank": result.rank,
        "worst_error": result.worst_error,
        "modules": {each.module: {"error": each.error} for each in result.modules},
        "notes": list(result.notes),
    }


def _text(result: ConvertResult, *, verbose: bool) -> str:
    count = len(result.modules)
    exact = result.worst_error == 0.0
    accuracy = "exact" if exact else f"error at most {result.worst_error:.3g}"
    lines = [f"{result.out}: {result.to}, {count} modules, rank {result.rank}, {accuracy}"]
    if verbose:
        rows = [("module", "error"), *((m.module, f"{m.error:.6f}") for m in result.modules)]
        lines += ["", table(rows)]
    return "\n".join(lines)
