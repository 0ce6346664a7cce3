"""``boneconv verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from boneconv.cli import options
from boneconv.cli.console import Bar, echo_json, note

if TYPE_CHECKING:
    from boneconv.verification import Report

__all__ = ["command"]

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("verify", short_help="Check that a candidate is what base and adapter mean.")
@click.argument("base")
@click.argument("adapter")
@click.argument("candidate")
@options.more_adapters(
    "A further adapter, in the order of the merge; with --component, NAME=PATH for another "
    "component. May be repeated.",
    "[NAME=]MORE",
)
@click.option(
    "--component",
    metavar="NAME",
    help="BASE and CANDIDATE are diffusers pipelines, and ADAPTER was merged into this component.",
)
@click.option(
    "--scale",
    type=float,
    metavar="S",
    help="Strength of the merge: W + S (W' - W).  [default: what CANDIDATE records, or 1]",
)
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    help="Dtype that every floating tensor should have.  [default: CANDIDATE's]",
)
@click.option(
    "--tolerance",
    type=click.Choice(["default", "canonical", "peft"]),
    default="default",
    show_default=True,
    help="What a weight may be. canonical: the exact value rounded once; default: that where "
    "CANDIDATE records it, else what accumulating in float32 may give; peft: also what PEFT's "
    "double rounding gives.",
)
@options.allow_base_mismatch
@click.option(
    "--logits",
    is_flag=True,
    help="Compare the answers too, with those of BASE and ADAPTER in float64. Takes torch and "
    "transformers, and for a graph ONNX Runtime.",
)
@click.option(
    "--prompts",
    type=_FILE,
    metavar="FILE",
    help="Prompts for --logits, one a line, or a JSON list in a .json file.  [default: a small "
    "built-in set]",
)
@options.as_json("report")
@click.option("--junit", type=_FILE, metavar="FILE", help="Write JUnit XML, a case per tensor.")
@click.option("--html", type=_FILE, metavar="FILE", help="Write one self-contained page.")
@click.option("--markdown", type=_FILE, metavar="FILE", help="Write Markdown for a pull request.")
@options.workers
@options.quiet
@options.verbose("every tensor, the worst first")
def command(
    base: str,
    adapter: str,
    candidate: str,
    more: tuple[str, ...],
    component: str | None,
    scale: float | None,
    dtype: str | None,
    tolerance: str,
    allow_base_mismatch: bool,
    logits: bool,
    prompts: Path | None,
    as_json: bool,
    junit: Path | None,
    html: Path | None,
    markdown: Path | None,
    workers: int | None,
    quiet: bool,
    verbose: bool,
) -> int:
    """Check that CANDIDATE is what BASE and ADAPTER mean, weight for weight.

    CANDIDATE is a merged folder or file, an ONNX graph, or a LoRA or MiSS adapter that was made of
    ADAPTER; with --component, a merged diffusers pipeline. The exit code is 0 if it is, and 1 if it
    is not; what is wrong is named where that can be told. In a step of GitHub's CI, the Markdown is
    added to its summary.

    Example: boneconv verify ./SmolLM2-135M ./my-bone-adapter ./merged --html report.html
    """
    from boneconv.reporting.publish import check_places
    from boneconv.verification import verify

    files = {"junit": junit, "html": html, "markdown": markdown}
    places = [path for path in files.values() if path is not None]
    more, components = options.by_component(component, more)
    adapters = [adapter, *more, *(path for paths in components.values() for path in paths)]
    check_places(places, [base, *adapters, candidate, *([str(prompts)] if prompts else [])])
    bar = Bar("verifying", quiet=quiet)
    try:
        report = verify(
            base,
            adapter,
            candidate,
            more=more,
            component=component,
            components=components,
            scale=scale,
            dtype=dtype,
            tolerance=tolerance,
            allow_base_mismatch=allow_base_mismatch,
            logits=logits,
            prompts=prompts,
            workers=workers,
            progress=bar,
            note=lambda text: note(text, quiet=quiet),
        )
    finally:
        bar.close()
    _print(report, as_json=as_json, verbose=verbose)
    _write(report, files, quiet=quiet)
    return 0 if report.passed else 1


def _print(report: Report, *, as_json: bool, verbose: bool) -> None:
    if as_json:
        from boneconv.reporting.as_json import verify_document

        echo_json(verify_document(report))
    else:
        from boneconv.reporting.table import verify_table

        click.echo(verify_table(report, verbose=verbose))


def _write(report: Report, files: dict[str, Path | None], *, quiet: bool) -> None:
    """Writes the reports that were asked for, and the summary of the step that this runs in."""
    from boneconv.reporting.markdown import verify_markdown
    from boneconv.reporting.publish import append_summary, write_report

    markdown = verify_markdown(report)
    if files["junit"] is not None:
        from boneconv.reporting.junit import verify_junit

        write_report(files["junit"], verify_junit(report))
    if files["html"] is not None:
        from boneconv.reporting.html import verify_html

        write_report(files["html"], verify_html(report))
    if files["markdown"] is not None:
        write_report(files["markdown"], markdown)
    append_summary(markdown)
    for path in files.values():
        if path is not None:
            note(f"wrote {path}", quiet=quiet)
