"""The HTML page, without a browser: what it holds, and that names stay names."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from boneconv.reporting.html import verify_html
from boneconv.reporting.text import plain
from boneconv.verification.report import Report
from tests.reporting.reports import (
    HOSTILE,
    honest,
    hostile,
    lora,
    not_finite,
    report,
    spoilt,
    stranger,
    weight,
)

REPORTS = [honest(), spoilt(), hostile(), lora(), not_finite(), report(())]


class Page(HTMLParser):
    """The tags of a page with their attributes, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def content(tag: str, page: str) -> str:
    (found,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
    return str(found)


@pytest.mark.parametrize("found", REPORTS)
def test_the_policy_allows_this_style_and_this_script_alone(found: Report) -> None:
    page = verify_html(found)
    (policy,) = [m["content"] for m in Page(page).all("meta") if "http-equiv" in m]
    digests = {
        tag: base64.b64encode(hashlib.sha256(content(tag, page).encode()).digest()).decode()
        for tag in ("style", "script")
    }
    assert policy == (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src 'sha256-{digests['style']}'; script-src 'sha256-{digests['script']}'"
    )


@pytest.mark.parametrize("found", REPORTS)
def test_it_refers_to_nothing_and_holds_no_inline_style_or_handler(found: Report) -> None:
    page = Page(verify_html(found))
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert [a["href"] for a in page.all("a")] == ["#tensors"]
    attributes = {name for _, found in page.tags for name in found}
    assert not attributes & {"src", "style", "action", "srcset", "background"}
    assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in content("style", verify_html(found))
    assert "url(" not in content("style", verify_html(found))
    assert {tag for tag, _ in page.tags}.isdisjoint({"iframe", "object", "embed", "img", "base"})


def test_names_are_shown_as_they_are() -> None:
    texts = Page(verify_html(hostile())).texts
    for name in HOSTILE:
        assert plain(name) in texts
        assert all(c.isprintable() for c in plain(name))


@pytest.mark.parametrize(
    ("found", "verdict", "stamp"),
    [
        (
            honest(30),
            "210 weights, every one the exact value rounded once; 30 other tensors byte for byte",
            "PASS",
        ),
        (
            spoilt(),
            "5 of 7 tensors are not what base and adapter mean: "
            "the adapter is missing in 2 weights",
            "FAIL",
        ),
    ],
)
def test_the_verdict_stands_at_the_top(found: Report, verdict: str, stamp: str) -> None:
    texts = [text.strip() for text in Page(verify_html(found)).texts if text.strip()]
    heading = texts.index(stamp)
    assert texts[heading + 1] == verdict
    assert texts.index("boneconv verify") == heading - 2


def test_names_in_the_table_break_after_dots_alone() -> None:
    page = verify_html(report((weight(3), stranger("<b>.x"))))
    assert "<code>model.<wbr>layers.<wbr>3.<wbr>self_attn.<wbr>q_proj.<wbr>weight</code>" in page
    assert "<code>&lt;b&gt;.<wbr>x</code>" in page


def test_every_tensor_has_a_row_and_every_adapted_weight_a_cell_on_both_maps() -> None:
    page = Page(verify_html(spoilt()))
    rows = [row for row in page.all("tr") if "data-status" in row]
    assert [row["data-status"] for row in rows] == ["fail"] * 5 + ["pass"] * 2
    cells = [cell["data-name"] for cell in page.all("td") if "data-name" in cell]
    assert len(cells) == 10
    assert sorted(cells[:5]) == sorted(cells[5:])


def test_a_lora_is_shown_by_its_relative_error() -> None:
    page = Page(verify_html(lora()))
    values = [cell["data-value"] for cell in page.all("td") if "data-value" in cell]
    assert values[3:] == ["0.01", "0.02", "0.03"]


# --- colours ----------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def palettes() -> dict[str, dict[str, str]]:
    style = content("style", verify_html(honest()))
    light, dark = re.findall(r":root \{(.*?)\}", style, re.S)
    colours = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in (light, dark)]
    return {"light": colours[0], "dark": colours[0] | colours[1]}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(scheme: str) -> None:
    colours = palettes()[scheme]
    pairs = [
        *(("ink", "paper"), ("quiet", "paper"), ("ink", "card"), ("quiet", "card")),
        *(("ink", "soft"), ("quiet", "soft"), ("accent", "paper"), ("accent", "soft")),
        *(("pass", "pass-soft"), ("fail", "fail-soft"), ("warn", "warn-soft")),
        *(("pass", "card"), ("fail", "card"), ("quiet", "zero"), ("paper", "ink")),
        *(("low", f"{ramp}{step}") for ramp in "ue" for step in range(1, 5)),
        *(("high", f"{ramp}{step}") for ramp in "ue" for step in range(5, 9)),
    ]
    poor = {pair for pair in pairs if contrast(colours[pair[0]], colours[pair[1]]) < 4.5}
    assert poor == set()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("ramp", ["u", "e"])
def test_shades_differ_in_lightness_so_that_no_colour_vision_is_needed(
    scheme: str, ramp: str
) -> None:
    colours = palettes()[scheme]
    steps = [luminance(colours[f"{ramp}{step}"]) for step in range(1, 9)]
    assert steps == sorted(steps, reverse=scheme == "light")
    for one, other in pairwise(steps):
        assert (max(one, other) + 0.05) / (min(one, other) + 0.05) > 1.1
