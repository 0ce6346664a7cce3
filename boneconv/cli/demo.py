"""``boneconv demo``."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from boneconv.cli import options
from boneconv.cli.console import echo_json, table

if TYPE_CHECKING:
    from boneconv.demo import DemoRow

__all__ = ["command"]

_STORY = """\
A tiny base model and two adapters were made in code, then each adapter was merged into the base.

  Bone adds its block B to every r columns of a weight:
      W'[:, j] = W[:, j] + B[j mod r, :]
  BAT cuts the weight into r x r tiles; a tile meets the block of its row of tiles:
      W'[a][b] = W[a][b] + W[a][b] B[a] + B[a]
"""


@click.command("demo", short_help="Merge tiny adapters into a tiny model and check the result.")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@options.as_json("rows")
def command(out: Path | None, as_json: bool) -> None:
    """Merge tiny adapters into a tiny model and check every weight against exact arithmetic.

    OUT is a new folder that keeps the models and adapters; without it nothing is kept.

    Example: boneconv demo ./boneconv-demo
    """
    from boneconv.demo import demo
    from boneconv.errors import CheckFailedError
    from boneconv.io.staging import check_free

    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            rows = demo(Path(folder))
    else:
        check_free(out, force=False)
        out.mkdir(parents=True)
        rows = demo(out)
    if as_json:
        echo_json([asdict(row) for row in rows])
    else:
        click.echo(_text(rows, out))
    if any(row.wrong for row in rows):
        raise CheckFailedError("merged weights differ from the exact results")


def _text(rows: list[DemoRow], out: Path | None) -> str:
    cells = [("variant", "weight", "shape", "block", "W[0,0]", "W'[0,0]", "changed", "wrong")]
    cells += [
        (
            row.variant,
            row.tensor,
            "x".join(map(str, row.weight_shape)),
            "x".join(map(str, row.block_shape)),
            f"{row.before:.5f}",
            f"{row.after:.5f}",
            f"{row.changed} of {row.elements}",
            str(row.wrong),
        )
        for row in rows
    ]
    weights = sum(row.elements for row in rows)
    wrong = sum(row.wrong for row in rows)
    lines = [_STORY, table(cells, indent="  "), ""]
    lines.append(
        f"Each of the {weights:,} merged weights was recomputed in exact arithmetic: "
        + ("all are correctly rounded." if not wrong else f"{wrong} ARE WRONG.")
    )
    if out is not None:
        lines.append(f"Try: boneconv merge {out}/base {out}/adapter-bone {out}/my-merge")
    return "\n".join(lines)
