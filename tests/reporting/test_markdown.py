"""Markdown: what it says, that names stay names, and that it stays small."""

from __future__ import annotations

import re

import pytest

from boneconv.reporting.markdown import LIMIT, verify_markdown
from boneconv.verification.report import FileReport, Finding, Severity, Status
from tests.reporting.reports import (
    HOSTILE,
    failed,
    honest,
    hostile,
    lora,
    not_finite,
    report,
    spoilt,
)


def test_a_pass() -> None:
    lines = verify_markdown(honest()).splitlines()
    assert lines[0] == "### \N{WHITE HEAVY CHECK MARK} PASS · boneconv verify"
    assert lines[2] == (
        "21 weights, every one the exact value rounded once; 3 other tensors byte for byte."
    )
    assert "| base | `HuggingFaceTB/SmolLM2-135M-Instruct@main` |" in lines
    assert "| rounding | 100 % correct, worst 0 ULP |" in lines
    assert "| control | the adapter moves the weights by 2.31 % of their norm |" in lines
    assert "| `model.layers.*.mlp.up_proj.weight` | 3 | 0 | 100 % | 0 | 0 | 0.03 |" in lines


def test_a_failure() -> None:
    lines = verify_markdown(spoilt()).splitlines()
    assert lines[0] == "### \N{CROSS MARK} FAIL · boneconv verify"
    assert "- **error** the adapter is missing in 2 weights: those of q_proj `not-applied`" in lines
    assert "- **1 tensor** neither base nor adapter has it: `old.weight`" in lines
    assert "- file `tokenizer.json`: differs from the base&#39;s" in lines
    assert "<details><summary>The 5 failed tensors, worst first</summary>" in lines


def test_every_table_has_one_width() -> None:
    for found in (honest(), spoilt(), hostile(), lora(), not_finite()):
        for table in re.findall(r"(?:^\|.*\n)+", verify_markdown(found), re.M):
            bars = {len(re.findall(r"\|", line)) for line in table.splitlines()}
            assert len(bars) == 1


def test_names_are_no_markup() -> None:
    text = verify_markdown(hostile())
    outside = re.sub(r"`[^`\n]*`", "", text)
    tags = set(re.findall(r"<[^>]*>", outside))
    assert tags <= {
        *("<details>", "</details>", "<summary>", "</summary>", "<code>", "</code>"),
        *("<sub>", "</sub>"),
    }
    assert "@everyone" not in outside
    assert "https://" not in outside
    assert "](" not in outside
    assert not re.search(r"^# heading", text, re.M)
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("count", [10, 1000, 20_000])
def test_it_stays_below_what_github_takes(count: int) -> None:
    tensors = tuple(
        failed(i, name=f"{'very.long.' * 20}{i}.weight", code=f"c{i}", diagnosis=f"d{i}")
        for i in range(count)
    )
    files = tuple(FileReport(f"file-{i}" * 30, Status.FAIL, "x" * 300) for i in range(count))
    findings = tuple(Finding(Severity.ERROR, f"code-{i}", "y" * 300, HOSTILE) for i in range(count))
    text = verify_markdown(report(tensors, files=files, findings=findings))
    assert len(text) <= LIMIT
    assert ("- and " in text) == (count > 10)
    assert text.startswith("### \N{CROSS MARK} FAIL")
    assert text.count("<details>") == text.count("</details>")


def test_hundreds_of_adapters_do_not_break_the_limit() -> None:
    text = verify_markdown(report((failed(0),), adapters=tuple(["x" * 400] * 1000)))
    assert len(text) <= LIMIT
