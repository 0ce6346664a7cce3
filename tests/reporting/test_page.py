"""The HTML page in a browser: no errors, no requests, every control by mouse and by keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from boneconv import merge, verify
from boneconv.reporting.html import verify_html
from boneconv.verification.report import Report
from tests.builders import make_adapter, make_base
from tests.reporting.reports import honest, hostile, lora, not_finite, report, spoilt

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = (1280, 400)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@contextmanager
def opened(
    browser: Browser, page_file: Path, *, width: int = 1280, scheme: Any = "light"
) -> Iterator[Page]:
    """The page; when it is left, nothing was wrong and nothing else was asked for."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    wrong: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    yield page
    assert wrong == []
    assert [url for url in asked if url != "data:,"] == [page_file.as_uri()]
    context.close()


def written(folder: Path, found: Report) -> Path:
    path = folder / "report.html"
    path.write_text(verify_html(found), encoding="utf-8")
    return path


def names(page: Page) -> list[str]:
    """The tensors that the table shows, in its order."""
    found: list[str] = page.locator("#list tbody tr:not([hidden]) th code").all_inner_texts()
    return found


def column(page: Page, title: str) -> list[str]:
    place = page.locator("#list thead th").all_inner_texts().index(title) + 1
    cells: list[str] = page.locator(f"#list tbody tr > :nth-child({place})").all_inner_texts()
    return cells


def overflow(page: Page) -> int:
    wide: int = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    return wide


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [honest, spoilt, hostile, lora, not_finite, lambda: report(())])
def test_any_report_opens_without_errors_and_fits(
    browser: Browser, tmp_path: Path, make: Any, width: int
) -> None:
    with opened(browser, written(tmp_path, make()), width=width) as page:
        assert page.title().startswith(("PASS: ", "FAIL: "))
        assert overflow(page) <= 0
        assert page.locator("script").count() == 1


def test_sorting_by_mouse(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, written(tmp_path, honest(10))) as page:
        update = page.get_by_role("button", name="Update")
        update.click()
        assert page.locator("#list th[aria-sort=descending]").inner_text() == "Update"
        values = [float(v) for v in column(page, "Update") if v != "-"]
        assert values == sorted(values, reverse=True)
        assert column(page, "Update")[-1] == "-"
        update.click()
        assert page.locator("#list th[aria-sort=ascending]").inner_text() == "Update"
        values = [float(v) for v in column(page, "Update") if v != "-"]
        assert values == sorted(values)
        assert column(page, "Update")[-1] == "-"
        assert page.locator("#list thead th:not([aria-sort=none])").count() == 1


def test_sorting_by_keyboard_and_numbers_within_names(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, written(tmp_path, honest(12))) as page:
        page.get_by_role("button", name="Status").focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        ordered = names(page)
        layers = [int(name.split(".")[2]) for name in ordered]
        assert layers == sorted(layers)
        page.keyboard.press("Space")
        assert names(page) == ordered[::-1]


def test_infinities_are_sorted_and_nan_is_last(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, written(tmp_path, not_finite())) as page:
        page.get_by_role("button", name="Max abs").click()
        assert column(page, "Max abs") == ["inf", "0", "NaN"]


def test_filtering(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, written(tmp_path, spoilt())) as page:
        assert page.locator("#shown").inner_text() == "7 tensors"
        page.get_by_label("Name contains").fill("LAYERS.1, weight")
        assert names(page) == [
            "model.layers.1.mlp.up_proj.weight",
            "model.layers.1.self_attn.q_proj.weight",
        ]
        assert page.locator("#shown").inner_text() == "2 of 7 tensors"
        page.get_by_label("Name contains").fill("")
        page.get_by_role("button", name="Failed").click()
        assert len(names(page)) == 5
        page.get_by_role("button", name="Adapted").click()
        assert len(names(page)) == 5
        assert page.locator("[aria-pressed=true]").inner_text() == "Adapted"
        page.get_by_role("button", name="All").click()
        assert len(names(page)) == 7


def test_a_map_is_walked_by_keyboard_and_leads_to_the_table(
    browser: Browser, tmp_path: Path
) -> None:
    with opened(browser, written(tmp_path, spoilt())) as page:
        update, error = page.get_by_role("grid").all()
        readout = page.locator(".map.error .readout")
        assert error.locator("[tabindex='0']").count() == 1
        assert update.locator("[tabindex='0']").count() == 1
        error.locator("[tabindex='0']").focus()
        seen = []
        for key in ("Home", "End", "ArrowLeft", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowRight"):
            page.keyboard.press(key)
            seen.append(readout.inner_text())
        q, up, down = "self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"
        said = {name: f"model.layers.{name}.weight" for name in (f"0.{q}", f"1.{q}", f"2.{q}")}
        assert seen == [
            f"{said[f'0.{q}']}: 212 ULP, failed",
            f"{said[f'2.{q}']}: 0 ULP",
            f"{said[f'1.{q}']}: 212 ULP, failed",
            f"model.layers.1.{up}.weight: - ULP, failed",
            f"model.layers.1.{up}.weight: - ULP, failed",
            f"{said[f'1.{q}']}: 212 ULP, failed",
            f"{said[f'2.{q}']}: 0 ULP",
        ]
        assert down not in seen[-1]
        page.keyboard.press("Enter")
        assert names(page) == [said[f"2.{q}"]]
        focused = page.evaluate("document.activeElement.id")
        assert focused == "filter"


def test_the_first_tab_stop_skips_to_the_table(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, written(tmp_path, honest())) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "tensors"


def test_every_tab_stop_is_visible_and_they_are_few(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, written(tmp_path, honest(30))) as page:
        stops = []
        for _ in range(40):
            page.keyboard.press("Tab")
            stop = page.evaluate(
                "(() => { const e = document.activeElement; const s = getComputedStyle(e);"
                " return [e.tagName, s.outlineStyle, e.textContent.trim().slice(0, 20)]; })()"
            )
            if stop[0] == "BODY":
                break
            stops.append(stop)
        assert stops[-1][0] == "BUTTON"
        assert len(stops) == 20
        assert all(stop[1] != "none" for stop in stops[1:])


def test_dark_and_light_differ(browser: Browser, tmp_path: Path) -> None:
    path = written(tmp_path, honest())
    grounds = []
    for scheme in ("light", "dark"):
        with opened(browser, path, scheme=scheme) as page:
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(251, 251, 249)", "rgb(18, 20, 23)"]


def test_a_name_cannot_run_even_where_it_is_not_escaped(browser: Browser, tmp_path: Path) -> None:
    """The second wall: what would happen if escaping failed."""
    path = tmp_path / "broken.html"
    attack = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    page_text = verify_html(honest()).replace("</main>", f"{attack}</main>")
    path.write_text(page_text, encoding="utf-8")
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.title().startswith("PASS: ")
    context.close()


@pytest.mark.slow
def test_thousands_of_tensors_are_sorted_at_once(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, written(tmp_path, honest(250))) as page:
        assert page.locator("#shown").inner_text() == "2,000 tensors"
        milliseconds = page.evaluate(
            "(() => { const t = performance.now();"
            " document.querySelector('#list thead th:last-child button').click();"
            " document.body.offsetHeight; return performance.now() - t; })()"
        )
        assert milliseconds < 5000
        assert overflow(page) <= 0


def screenshots(browser: Browser, page_file: Path, folder: Path) -> list[Path]:
    """One for every width and colour scheme, of the whole page; each is held to fit."""
    made = []
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            with opened(browser, page_file, width=width, scheme=scheme) as page:
                assert overflow(page) <= 0
                made.append(folder / f"{page_file.stem}-{scheme}-{width}.png")
                page.screenshot(path=made[-1], full_page=True)
    return made


def test_a_verification(browser: Browser, tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", "bat")
    merge(base, adapter, tmp_path / "merged")
    path = written(tmp_path, verify(base, adapter, tmp_path / "merged"))
    with opened(browser, path) as page:
        heading = page.get_by_role("heading", level=1).inner_text()
        assert "PASS" in heading
        assert "6 weights, every one the exact value rounded once" in heading
        assert page.locator(".map.update td[data-name]").count() == 6
    for picture in screenshots(browser, path, tmp_path):
        assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_the_real_model(
    browser: Browser, tmp_path: Path, real_base: Path, trained_bone: Path
) -> None:
    merge(real_base, trained_bone, tmp_path / "merged")
    found = verify(real_base, trained_bone, tmp_path / "merged")
    path = written(tmp_path, found)
    with opened(browser, path) as page:
        heading = page.get_by_role("heading", level=1).inner_text()
        assert "210 weights, every one the exact value rounded once" in heading
        assert page.locator(".map.update td[data-name]").count() == 210
        assert len(names(page)) == len(found.tensors)
        values = page.locator(".map.error td[data-name]").all_inner_texts()
        assert set(values) == {"0"}
    for picture in screenshots(browser, path, tmp_path):
        assert picture.stat().st_size > 50_000
