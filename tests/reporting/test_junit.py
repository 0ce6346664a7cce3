"""JUnit XML, read back with the library and with a plain parser."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from junitparser import JUnitXml

from boneconv import __version__
from boneconv.reporting.junit import verify_junit
from boneconv.reporting.text import plain
from boneconv.verification.report import Report, Status
from tests.reporting.reports import honest, hostile, lora, not_finite, spoilt


def test_a_case_for_each_tensor_file_and_error() -> None:
    xml = JUnitXml.fromstring(verify_junit(spoilt()))
    suites = {suite.name: suite for suite in xml}
    assert {name: (s.tests, s.failures) for name, s in suites.items()} == {
        "weights": (7, 5),
        "files": (2, 1),
        "findings": (1, 1),
    }
    assert (xml.tests, xml.failures, xml.errors, xml.skipped) == (10, 7, 0, 0)
    assert [case.name for case in suites["weights"]] == [t.name for t in spoilt().tensors]


def test_a_failure_says_why_and_how_far() -> None:
    xml = JUnitXml.fromstring(verify_junit(spoilt()))
    (weights,) = (suite for suite in xml if suite.name == "weights")
    case = next(c for c in weights if c.name == "model.layers.0.self_attn.q_proj.weight")
    (failure,) = case.result
    assert failure.type == "not-applied"
    assert failure.message == (
        "equals the base: the adapter was not applied there; "
        "75.00 % of the elements are off, by up to 212 ULP"
    )
    assert failure.text.startswith("merge BF16 576x576, correctly rounded 25.00 %, max ULP 212")


def test_totals_are_properties() -> None:
    weights = next(iter(JUnitXml.fromstring(verify_junit(honest()))))
    assert {p.name: p.value for p in weights.properties()} == {
        "boneconv": __version__,
        "verdict": "PASS: 21 weights, every one the exact value rounded once; "
        "3 other tensors byte for byte",
        "base": "HuggingFaceTB/SmolLM2-135M-Instruct@main",
        "adapter": "./adapter",
        "candidate": "./merged",
        "kind": "checkpoint",
        "tolerance": "canonical",
        "tensors": "24",
        "adapted": "21",
        "identical": "24",
        "failed": "0",
        "share correctly rounded": "100 %",
        "max error in ULP": "0",
        "update norm": "0.0231",
    }


@pytest.mark.parametrize("found", [honest(), spoilt(), hostile(), lora(), not_finite()])
def test_it_is_xml_whatever_the_names(found: Report) -> None:
    root = ET.fromstring(verify_junit(found))
    cases = root.findall("./testsuite[@name='weights']/testcase")
    assert [case.get("name") for case in cases] == [plain(t.name) for t in found.tensors]
    assert [case.find("failure") is not None for case in cases] == [
        t.status is Status.FAIL for t in found.tensors
    ]
