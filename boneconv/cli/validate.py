"""``boneconv validate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from boneconv.cli import options
from boneconv.cli.console import echo_json, one_line

if TYPE_CHECKING:
    from boneconv.formats.native import Violation
    from boneconv.validation import Validation

__all__ = ["command"]

_NAMES = {"native": "Bone Adapter Format 1.0", "peft": "PEFT", "rwkv": "RWKV-PEFT"}


@click.command("validate", short_help="Check an adapter against the rules of its format.")
@click.argument("adapter")
@click.option("--base", metavar="BASE", help="Hold it against this base too; its weights are read.")
@click.option(
    "--scale",
    type=float,
    default=1.0,
    show_default=True,
    metavar="S",
    help="Strength for which --base checks that the result is finite.",
)
@options.as_json()
def command(adapter: str, base: str | None, scale: float, as_json: bool) -> int:
    """Check ADAPTER against the numbered rules of the Bone Adapter Format.

    All violations of the first stage that fails are listed, and the versions of PEFT that load the
    adapter. The exit code is 1 if there are violations, and 2 if ADAPTER is no Bone adapter at all.

    Example: boneconv validate ./my-bone-adapter
    """
    from boneconv.validation import validate

    result = validate(adapter, base=base, scale=scale)
    echo_json(_json(result)) if as_json else click.echo(_text(result))
    if result.valid:
        return 0
    return 1 if result.is_adapter else 2


def _json(result: Validation) -> dict[str, Any]:
    from boneconv.formats.native import RULES

    return {
        "path": str(result.path),
        "format": result.format,
        "base_checked": result.with_base,
        "valid": result.valid,
        "violations": [
            {
                "rule": violation.rule,
                "title": RULES[violation.rule].title,
                "error": RULES[violation.rule].error.__name__,
                "path": violation.path,
                "message": violation.message,
                "expected": violation.expected,
                "found": violation.found,
                "hint": violation.hint,
            }
            for violation in result.violations
        ],
        "peft": {
            "loads": result.peft.versions is not None,
            "versions": result.peft.versions,
            "reason": result.peft.reason,
        },
    }


def _text(result: Validation) -> str:
    count = len(result.violations)
    verdict = "valid" if result.valid else f"{count} violation{'s' if count > 1 else ''}"
    lines = [
        one_line(f"adapter  {result.path}"),
        f"format   {_NAMES.get(result.format, result.format)}",
        one_line(f"PEFT     {result.peft}"),
        f"result   {verdict}{', with the base' if result.with_base and result.valid else ''}",
    ]
    for violation in result.violations:
        lines += ["", *_violation(violation)]
    return "\n".join(lines)


def _violation(violation: Violation) -> list[str]:
    from boneconv.formats.native import RULES

    rule = RULES[violation.rule]
    lines = [
        f"{rule.id} {rule.error.__name__}: {rule.title}",
        f"  {violation.path}: {violation.message}",
    ]
    for label, text in (
        ("expected", violation.expected),
        ("found", violation.found),
        ("hint", violation.hint),
    ):
        if text is not None:
            lines.append(f"  {label} {text[:900]}")
    return [one_line(line) for line in lines]
