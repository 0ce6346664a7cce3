"""The JSON documents and their schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from boneconv import __version__
from boneconv.reporting.as_json import diff_document, verify_document
from boneconv.verification.report import DiffReport, Report
from tests.reporting.reports import (
    different,
    honest,
    hostile,
    lora,
    not_finite,
    report,
    same,
    spoilt,
)

SPECS = Path(__file__).parents[2] / "specs"
VERIFY = json.loads((SPECS / "verify-report-1.0.schema.json").read_text(encoding="utf-8"))
DIFF = json.loads((SPECS / "diff-report-1.0.schema.json").read_text(encoding="utf-8"))
REPORTS = [honest(), spoilt(), hostile(), lora(), not_finite(), report(())]


def conforms(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    """The document as a reader of strict JSON gets it, held against its schema."""
    text = json.dumps(document, allow_nan=False)
    read = json.loads(text)
    jsonschema.validate(read, schema, cls=jsonschema.Draft202012Validator)
    return read


@pytest.mark.parametrize("schema", [VERIFY, DIFF])
def test_the_schemas_are_schemas(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("found", REPORTS)
def test_a_verification_conforms(found: Report) -> None:
    read = conforms(verify_document(found), VERIFY)
    assert read["boneconv"] == __version__
    assert read["passed"] is found.passed
    assert [t["name"] for t in read["tensors"]] == [t.name for t in found.tensors]
    assert [t["max_abs"] for t in read["tensors"]] == [
        "Infinity" if t.max_abs == float("inf") else "NaN" if t.max_abs != t.max_abs else t.max_abs
        for t in found.tensors
    ]


@pytest.mark.parametrize("found", [same(), different()])
def test_a_comparison_conforms(found: DiffReport) -> None:
    read = conforms(diff_document(found), DIFF)
    assert read["identical"] is found.identical
    assert len(read["tensors"]) == len(found.tensors)
    assert read["settings"] == [{"name": n, "a": a, "b": b} for n, a, b in found.settings]


def undescribed(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> Iterator[str]:
    """The members of a document that its schema does not describe."""
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    if isinstance(value, dict):
        for key, each in value.items():
            if key in schema.get("properties", {}):
                yield from undescribed(each, schema["properties"][key], root)
            else:
                yield key
    elif isinstance(value, list):
        for each in value:
            yield from undescribed(each, schema.get("items", {}), root)


@pytest.mark.parametrize(
    ("document", "schema"),
    [(verify_document(spoilt()), VERIFY), (diff_document(different()), DIFF)],
)
def test_every_member_is_described(document: dict[str, Any], schema: dict[str, Any]) -> None:
    assert set(undescribed(document, schema, schema)) == set()


@pytest.mark.parametrize(
    "change",
    [
        {"format": "another"},
        {"version": "2.0"},
        {"passed": "yes"},
        {"tolerance": "lenient"},
        {"tensors": [{"name": "x"}]},
        {"totals": {}},
    ],
)
def test_the_schema_refuses_what_is_no_report(change: dict[str, Any]) -> None:
    document = json.loads(json.dumps(verify_document(honest()))) | change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, VERIFY, cls=jsonschema.Draft202012Validator)
