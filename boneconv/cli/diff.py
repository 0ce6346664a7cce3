"""``boneconv diff``."""

from __future__ import annotations

import click

from boneconv.cli import options
from boneconv.cli.console import Bar, echo_json

__all__ = ["command"]


@click.command("diff", short_help="Compare two checkpoints or two adapters.")
@click.argument("a")
@click.argument("b")
@options.workers
@options.as_json("report")
@options.quiet
@options.verbose("every tensor, equal ones too")
def command(a: str, b: str, workers: int | None, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Compare A and B, two checkpoints or two adapters, tensor by tensor.

    The exit code is 0 if they are the same, 1 if they differ, and 2 or 3 if they cannot be
    compared.

    Example: boneconv diff ./merged ./merged-again
    """
    from boneconv.verification import diff

    bar = Bar("comparing", quiet=quiet)
    try:
        report = diff(a, b, workers=workers, progress=bar)
    finally:
        bar.close()
    if as_json:
        from boneconv.reporting.as_json import diff_document

        echo_json(diff_document(report))
    else:
        from boneconv.reporting.diff_table import diff_table

        click.echo(diff_table(report, verbose=verbose))
    return 0 if report.identical else 1
