"""Options that several commands have, said once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import click

__all__ = ["as_json", "force", "more_adapters", "quiet", "verbose", "workers"]

Decorator: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]

force: Decorator = click.option("--force", is_flag=True, help="Replace OUT if it exists.")

quiet: Decorator = click.option("--quiet", "-q", is_flag=True, help="No progress and no remarks.")

workers: Decorator = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Worker processes; by default one for each usable core.",
)


def as_json(what: str = "result") -> Decorator:
    """``--json``, of what the command prints."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print the {what} as JSON.")


def verbose(what: str) -> Decorator:
    """``--verbose``, which lists something."""
    return click.option("--verbose", "-v", is_flag=True, help=f"List {what}.")


def more_adapters(help_text: str) -> Decorator:
    """``--adapter``, for those after the first."""
    return click.option("--adapter", "more", multiple=True, metavar="MORE", help=help_text)
