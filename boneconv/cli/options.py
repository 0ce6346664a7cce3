"""Options that several commands have, said once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import click

__all__ = [
    "allow_base_mismatch",
    "as_json",
    "by_component",
    "force",
    "more_adapters",
    "quiet",
    "verbose",
    "workers",
]

Decorator: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]

force: Decorator = click.option("--force", is_flag=True, help="Replace OUT if it exists.")

quiet: Decorator = click.option("--quiet", "-q", is_flag=True, help="No progress and no remarks.")

workers: Decorator = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Worker processes; by default one for each usable core.",
)


allow_base_mismatch: Decorator = click.option(
    "--allow-base-mismatch",
    is_flag=True,
    help="Go on where the adapter's fingerprint names another base.",
)


def as_json(what: str = "result") -> Decorator:
    """``--json``, of what the command prints."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print the {what} as JSON.")


def verbose(what: str) -> Decorator:
    """``--verbose``, which lists something."""
    return click.option("--verbose", "-v", is_flag=True, help=f"List {what}.")


def more_adapters(help_text: str, metavar: str = "MORE") -> Decorator:
    """``--adapter``, for those after the first."""
    return click.option("--adapter", "more", multiple=True, metavar=metavar, help=help_text)


def by_component(
    component: str | None, more: tuple[str, ...]
) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """What ``--adapter`` gives: adapters of the ``--component``, if any, and those of others.

    These are said as NAME=PATH, unless that is a path itself.
    """
    if component is None:
        return more, {}
    first: list[str] = []
    others: dict[str, list[str]] = {}
    for text in more:
        name, separator, path = text.partition("=")
        if separator and path and name.isidentifier() and not Path(text).exists():
            others.setdefault(name, []).append(path)
        else:
            first.append(text)
    return tuple(first), others
