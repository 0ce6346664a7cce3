"""``boneconv export-onnx``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from boneconv.cli import options
from boneconv.cli.console import Bar, echo_json, note, size

if TYPE_CHECKING:
    from boneconv.onnx import ExportResult

__all__ = ["command"]


@click.command("export-onnx", short_help="Export a base with an adapter to ONNX.")
@click.argument("base")
@click.argument("adapter")
@click.argument("out", type=click.Path())
@options.more_adapters("A further adapter, applied after the first; may be repeated.")
@click.option(
    "--graph",
    metavar="BASE.onnx",
    help="The base's graph: patch its weights instead of tracing the model anew.",
)
@click.option(
    "--task",
    default="auto",
    show_default=True,
    metavar="TASK",
    help="What the traced model is for, such as text-generation or feature-extraction.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype of a traced graph's weights; by default float32.",
)
@click.option("--opset", type=click.IntRange(min=1), help="ONNX opset of a traced graph.")
@click.option(
    "--runtime",
    type=click.Choice(["genai"]),
    help="Make a folder for a runtime of its own: onnxruntime-genai.",
)
@click.option(
    "--runtime-adapters",
    is_flag=True,
    help="Keep the adapters apart from the graph, as files that a session can swap.",
)
@click.option(
    "--bat-activation",
    is_flag=True,
    help="With --runtime-adapters: compute BAT at run time too (1.5 to 2 times slower).",
)
@options.workers
@options.allow_base_mismatch
@click.option(
    "--verify",
    "verified",
    is_flag=True,
    help="Before OUT appears, compare the graph's answers with those of BASE and ADAPTER in "
    "float64. Takes torch, transformers and ONNX Runtime.",
)
@click.option(
    "--prompts",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Prompts for --verify, one a line, or a JSON list in a .json file.  [default: a small "
    "built-in set]",
)
@options.force
@options.as_json()
@options.quiet
def command(
    base: str,
    adapter: str,
    out: str,
    more: tuple[str, ...],
    graph: str | None,
    task: str,
    dtype: str | None,
    opset: int | None,
    runtime: str | None,
    runtime_adapters: bool,
    bat_activation: bool,
    workers: int | None,
    allow_base_mismatch: bool,
    verified: bool,
    prompts: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Export BASE with ADAPTER merged into it to OUT, as an ONNX graph.

    With --graph, the adapted weights of an existing graph of BASE are found by their content and
    overwritten, in seconds and without torch. Without it, the merged model is traced, which takes
    minutes and several times the model's memory. OUT is a folder with model.onnx, or one file when
    its name ends in .onnx; it appears whole or not at all.

    Example: boneconv export-onnx ./SmolLM2-135M ./my-bone-adapter ./out --graph base.onnx
    """
    from boneconv.errors import UsageError
    from boneconv.onnx import export_onnx

    check = None
    if verified:
        from boneconv.behaviour.loading import require_torch
        from boneconv.behaviour.prompts import read_prompts
        from boneconv.cli.verified import GraphCheck

        require_torch("onnxruntime")
        read_prompts(prompts)
        check = GraphCheck(
            base, (adapter, *more), prompts=prompts, apart=runtime_adapters, quiet=quiet
        )
    elif prompts is not None:
        raise UsageError("prompts are for comparing answers", hint="Add --verify")
    bar = Bar("exporting", quiet=quiet)
    try:
        result = export_onnx(
            base,
            adapter,
            out,
            more=more,
            graph=graph,
            task=task,
            dtype=dtype,
            opset=opset,
            runtime=runtime,
            runtime_adapters=runtime_adapters,
            bat_activation=bat_activation,
            workers=workers,
            check=check,
            allow_base_mismatch=allow_base_mismatch,
            force=force,
            progress=bar,
            note=lambda text: note(text, quiet=quiet),
        )
    finally:
        bar.close()
    if as_json:
        found = {} if check is None else {"verified": check.verdicts}
        echo_json(_as_json(result) | found)
    else:
        click.echo(_as_text(result))


def _as_json(result: ExportResult) -> dict[str, Any]:
    return {
        "out": str(result.out),
        "graph": str(result.graph),
        "record": str(result.record),
        "method": result.method,
        "weights": result.weights,
        "bytes": _nbytes(result),
        "files": list(result.files),
        "notes": list(result.notes),
    }


def _as_text(result: ExportResult) -> str:
    what = {
        "patch": "weights of the graph written",
        "trace": "weights traced",
        "genai": "weights built in",
        "runtime-adapters": "modules to adapt",
    }[result.method]
    return f"{result.out}: {result.weights} {what}, {size(_nbytes(result))}"


def _nbytes(result: ExportResult) -> int:
    folder = result.out if result.out.is_dir() else Path(result.out).parent
    return sum((folder / name).stat().st_size for name in result.files)
