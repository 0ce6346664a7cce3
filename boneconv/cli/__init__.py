"""The command line: one module a command, imported when it is called.

`main` is the only place that turns errors into exit codes: 0 done, 1 a check did not hold, 2 bad
usage or input, 3 the machine, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from boneconv import __version__

__all__ = ["cli", "main"]

_COMMANDS = {
    "merge": "Merge an adapter into a checkpoint.",
    "unmerge": "Restore the base of a merged checkpoint.",
    "export-onnx": "Export a base with an adapter to ONNX.",
    "convert": "Convert an adapter to another format.",
    "verify": "Check that a candidate is what base and adapter mean.",
    "diff": "Compare two checkpoints or two adapters.",
    "validate": "Check an adapter against the rules of its format.",
    "inspect": "Show what an adapter or a checkpoint holds.",
    "demo": "Merge tiny adapters into a tiny model and check the result.",
}

#: Every worker computes by itself; a BLAS with threads of its own would only get in their way. Not
#: so in `_NO_WORKERS`, which compute one matrix after the other.
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS")
_NO_WORKERS = ("convert", "export-onnx")


class _Commands(click.Group):
    """Knows the commands' names and summaries, and imports one only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"boneconv.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="boneconv")
def cli() -> None:
    """Bone, BAT and MiSS adapters: merge them into checkpoints, inspect them.

    Example: boneconv merge BASE ADAPTER OUT
    """


def main() -> None:
    """The ``boneconv`` script."""
    if sys.argv[1:2] not in [[name] for name in _NO_WORKERS]:
        for name in _ONE_THREAD:
            os.environ.setdefault(name, "1")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs a command line and returns its exit code."""
    from boneconv.errors import BoneconvError, MachineError

    try:
        result = cli.main(arguments, prog_name="boneconv", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return 2
    except BoneconvError as error:
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except OSError as error:
        click.echo(f"Error: {MachineError(str(error))}", err=True)
        return 3
    return result if isinstance(result, int) else 0
