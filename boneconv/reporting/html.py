"""A verification as one HTML page that needs nothing else: no network, no fonts, no other file.

The page's policy allows its own style and script by their digests and nothing more, so that a name
in a file, which a stranger chose, could not run or load anything even if it were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from boneconv import __version__
from boneconv.reporting.behaviour import HEAD, behaviour_facts, behaviour_rows
from boneconv.reporting.heat_map import HeatMap, heat_map, short, shown_tensors
from boneconv.reporting.summary import (
    ADAPTED,
    RULES,
    control,
    errors,
    failed_files,
    failure_groups,
    notices,
    verdict,
    worst_first,
)
from boneconv.reporting.text import cosine, count, number, percent, plain, shape
from boneconv.verification.report import Report, TensorReport

__all__ = ["verify_html"]

_SIZE = "|W' - W| / |W|"
#: Up to this many columns, the cells of a map have room for their values.
_ROOM_FOR_VALUES = 34
#: Up to this many, they do not take the whole width.
_FEW = 12


def verify_html(report: Report) -> str:
    """The page.

    Args:
        report: What was found.
    """
    style, script = _asset("report.css"), _asset("report.js")
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            version=__version__,
            style=Markup(style),
            script=Markup(script),
            policy=_policy(style, script),
            verdict=verdict(report),
            rule=RULES.get(report.tolerance, report.tolerance),
            control=control(report),
            errors=errors(report),
            notices=notices(report),
            groups=failure_groups(report),
            files=failed_files(report),
            maps=_maps(report),
            tensors=worst_first(report.tensors),
            adapted=ADAPTED,
            figures=list(_figures(report)),
            answers=_answers(report),
            answers_head=HEAD,
        )
    )


def _answers(report: Report) -> dict[str, Any] | None:
    """The comparison of answers: facts and rows; None where there was none."""
    if report.behaviour is None:
        return None
    return {
        "status": str(report.behaviour.status),
        "facts": behaviour_facts(report.behaviour),
        "rows": behaviour_rows(report.behaviour),
    }


def _figures(report: Report) -> Iterator[tuple[str, str, str]]:
    """The numbers at the top: title, value, unit; those that have a meaning."""
    totals = report.totals
    yield "Exact bytes", f"{totals.identical:,}", f"of {count(totals.tensors, 'tensor')}"
    if totals.share_correct is not None:
        yield "Correctly rounded", percent(totals.share_correct), "of adapted elements"
    if totals.max_ulp is not None:
        yield "Largest error", number(totals.max_ulp), "ULP"
    else:
        errors = [t.relative_frobenius for t in report.tensors if t.relative_frobenius is not None]
        if errors:
            yield "Largest error", number(max(errors)), "of an update's norm"
    if totals.update_norm is not None:
        title = "Control: size of the update"
        yield title, f"{number(100 * totals.update_norm)} %", "of the weights' norm"
    for each in report.behaviour.deciding if report.behaviour is not None else ():
        yield f"Error of answers, {each.name}", number(each.rms_ratio), "times float32's own"


@dataclass(frozen=True)
class _Map:
    """A heat map with its texts; ``id`` names its ramp of colours."""

    id: str
    title: str
    text: str
    unit: str
    grid: HeatMap

    @property
    def layout(self) -> str:
        """How wide its cells are."""
        columns = len(self.grid.layers)
        return "few" if columns <= _FEW else "values" if columns <= _ROOM_FOR_VALUES else "dense"


def _maps(report: Report) -> list[_Map]:
    """The heat maps; none where no weight is adapted."""
    tensors = shown_tensors(report.tensors)
    if not tensors:
        return []
    text = f"How far the adapter moves each weight: {_unbroken(_SIZE)}, in percent."
    grid = heat_map(tensors, _update_percent)
    return [_Map("update", "Size of the update", text, " %", grid), _error_map(tensors)]


def _error_map(tensors: list[TensorReport]) -> _Map:
    """In ULP where values are rounded, else (a LoRA) relative."""
    if any(tensor.max_ulp is not None for tensor in tensors):
        text = (
            "The largest error of an element, in units in the last place (ULP) of "
            "the candidate's dtype."
        )
        return _Map("error", "Error", text, " ULP", heat_map(tensors, lambda t: t.max_ulp))
    text = f"How far each update is off: {_unbroken('|candidate - exact| / |exact|')}."
    return _Map("error", "Error", text, "", heat_map(tensors, lambda t: t.relative_frobenius))


def _unbroken(formula: str) -> str:
    return formula.replace(" ", "\N{NO-BREAK SPACE}")


def _breaking(name: str) -> Markup:
    """A name that goes on in the next line after a dot, where it must."""
    return Markup("<wbr>").join(
        escape(part) for part in plain(name).replace(".", ".\n").split("\n")
    )


def _update_percent(tensor: TensorReport) -> float | None:
    return None if tensor.update_norm is None else 100 * tensor.update_norm


def _policy(style: str, script: str) -> str:
    return (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _asset(name: str) -> str:
    folder = resources.files("boneconv.reporting") / "page"
    return (folder / name).read_text(encoding="utf-8").strip()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("boneconv.reporting", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breaking": _breaking,
        "cosine": cosine,
        "counted": count,
        "number": number,
        "percent": percent,
        "plain": plain,
        "shape": shape,
        "short": short,
    }
    return environment
