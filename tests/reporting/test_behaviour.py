"""The comparison of answers in every report: what passed, what failed, what proves nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from junitparser import JUnitXml

from boneconv.behaviour.report import (
    BehaviourReport,
    BehaviourStatus,
    Distance,
    Divergence,
    Greedy,
    InputSet,
)
from boneconv.reporting.as_json import verify_document
from boneconv.reporting.behaviour import behaviour_facts, behaviour_rows, behaviour_verdict
from boneconv.reporting.html import verify_html
from boneconv.reporting.junit import verify_junit
from boneconv.reporting.markdown import verify_markdown
from boneconv.reporting.summary import headline
from boneconv.reporting.table import verify_table
from boneconv.verification.report import Report
from tests.reporting.reports import HOSTILE, honest, spoilt

SCHEMA = json.loads(
    (Path(__file__).parents[2] / "specs" / "verify-report-1.0.schema.json").read_text()
)
REASON = "on text, the candidate is off by 620 times the RMS error of float32 (at most 5)"


def inputs(name: str = "text", **fields: Any) -> InputSet:
    one = InputSet(
        name=name,
        decides=name != "random",
        inputs=7,
        positions=161,
        candidate=Distance(1.11e-5, 5.6e-5, 8e-6, 4.6e-12, 1.0),
        yardstick=Distance(9e-6, 5e-5, 7e-6, 4e-12, 1.0),
        control=Distance(8.53, 41.0, 6.1, 4.2, 0.25),
        rounding=None,
        rms_ratio=1.23,
        max_ratio=1.12,
        passed=True,
    )
    return replace(one, **fields)


def behaviour(**fields: Any) -> BehaviourReport:
    found = BehaviourReport(
        status=BehaviourStatus.PASS,
        reasons=(),
        output="logits",
        model="LlamaForCausalLM",
        runtime="ONNX Runtime 1.32.0",
        reference="float64",
        weights=("float32",),
        prompts="built-in",
        rms_limit=5.0,
        max_limit=10.0,
        sets=(inputs(), inputs("random", rms_ratio=2.52)),
        greedy=Greedy(2, 24, ()),
        memory=3_100_000_000,
    )
    return replace(found, **fields)


def failed(**fields: Any) -> BehaviourReport:
    wrong: dict[str, Any] = {
        "status": BehaviourStatus.FAIL,
        "reasons": (REASON,),
        "sets": (inputs(rms_ratio=620.0, max_ratio=410.0, passed=False),),
        "greedy": Greedy(2, 24, (Divergence(1, 4, 17, 99, 0.25, False),)),
    }
    return behaviour(**(wrong | fields))


def with_answers(found: BehaviourReport, report: Report | None = None) -> Report:
    return replace(report or honest(), behaviour=found)


ALL = [
    behaviour(),
    failed(),
    behaviour(status=BehaviourStatus.INCONCLUSIVE, reasons=("it proves nothing",)),
    behaviour(status=BehaviourStatus.MEASURED, rms_limit=None, max_limit=None, greedy=None),
    failed(sets=(), greedy=None, reasons=HOSTILE, notes=HOSTILE, prompts="none"),
    failed(sets=(inputs(rms_ratio=math.inf, candidate=Distance(math.nan, math.nan, 0.0)),)),
    behaviour(weights=("bfloat16",), sets=(inputs(rounding=Distance(0.05, 0.2, 0.01)),)),
]


@pytest.mark.parametrize("found", ALL)
def test_the_document_conforms_to_its_schema(found: BehaviourReport) -> None:
    document = json.loads(json.dumps(verify_document(with_answers(found)), allow_nan=False))
    jsonschema.validate(document, SCHEMA, cls=jsonschema.Draft202012Validator)
    assert document["behaviour"]["status"] == found.status
    assert document["passed"] is found.passed


def test_without_a_comparison_the_document_says_none() -> None:
    document = verify_document(honest())
    assert document["behaviour"] is None
    jsonschema.validate(document, SCHEMA, cls=jsonschema.Draft202012Validator)


def test_the_verdict_names_the_answers() -> None:
    text = headline(with_answers(behaviour()))
    assert text.startswith("PASS: ")
    assert text.endswith("; logits within 1.23 times the error of float32")
    expected = f"FAIL: the weights agree, but not the answers: logits: {REASON}"
    assert headline(with_answers(failed())) == expected
    assert headline(with_answers(behaviour(), spoilt())) == headline(spoilt())


def test_what_proves_nothing_does_not_pass() -> None:
    report = with_answers(ALL[2])
    assert report.weights_passed
    assert not report.passed
    assert "it proves nothing" in headline(report)


def test_an_approximation_by_its_own_record_is_held_to_no_limit() -> None:
    assert with_answers(ALL[3]).passed
    assert "held to no limit" in behaviour_verdict(ALL[3])
    assert ("limits", "none") in behaviour_facts(ALL[3])


def test_the_control_is_always_shown() -> None:
    control = "the adapter moves the answers on text by 8.53 (RMS), 4.2 nats of KL"
    for render in (verify_table, verify_markdown, verify_html):
        text = render(with_answers(behaviour()))
        assert control.partition(" (")[0] in text
        assert "75.00 %" in text


def test_the_table_has_a_row_for_each_kind_of_inputs() -> None:
    text = verify_table(with_answers(behaviour()))
    assert "answers    pass" in text
    (row,) = [line for line in text.splitlines() if line.startswith("random (7, aside)")]
    assert "2.52" in row
    assert behaviour_rows(behaviour())[0][0] == "text (7)"


def test_a_divergence_is_told_with_its_gap() -> None:
    text = verify_table(with_answers(failed()))
    assert "first divergent at token 5 after prompt 2: 99 for 17, which leads by 0.25" in text


def test_junit_has_a_suite_for_answers() -> None:
    xml = JUnitXml.fromstring(verify_junit(with_answers(failed())).encode())
    (suite,) = [suite for suite in xml if suite.name == "behaviour"]
    assert [case.name for case in suite] == ["logits", "logits on text"]
    assert suite.failures == 2
    xml = JUnitXml.fromstring(verify_junit(with_answers(behaviour())).encode())
    (suite,) = [suite for suite in xml if suite.name == "behaviour"]
    assert (suite.tests, suite.failures) == (2, 0)
    assert "behaviour" not in verify_junit(honest())


def test_a_strangers_words_are_no_markup() -> None:
    report = with_answers(ALL[4])
    page, text = verify_html(report), verify_table(report)
    assert "<img src=x" not in page
    assert "alert(1)</script>" not in page
    assert "<img" not in verify_markdown(report)
    assert "\x1b" not in text + page + verify_markdown(report) + verify_junit(report)
