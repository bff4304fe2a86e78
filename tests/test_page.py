"""The rating page in a browser: widths, dark mode, print, keyboard, accessibility. Cost: 30 s.

Needs ``pip install playwright axe-playwright-python`` and ``apt install chromium``, which nothing
else does; skipped without them. ``PAGE_SCREENSHOTS`` names a folder to keep the screenshots in.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from percepiano_ast.data import demo
from percepiano_ast.inference.page import write_page
from percepiano_ast.inference.rate import load_model

CHROMIUM = shutil.which("chromium")
MISSING = [
    name for name in ("playwright", "axe_playwright_python") if not importlib.util.find_spec(name)
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING) or not CHROMIUM,
        reason="needs pip install playwright axe-playwright-python, apt install chromium",
    ),
]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The page of one recording and that of two."""
    home = tmp_path_factory.mktemp("pages")
    model = load_model()
    rated = [model.rate(demo.write_example(home, name)) for name in ("example", "second example")]
    return {
        "one": write_page(rated[:1], home / "one.html"),
        "two": write_page(rated, home / "two.html"),
    }


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, pages):
    contexts = []

    def open_page(name: str, width: int = 1280, scheme: str = "light", media: str = "screen"):
        contexts.append(
            chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        )
        page = contexts[-1].new_page()
        page.emulate_media(media=media, color_scheme=scheme)
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:")) else problems.append(request.url)
            ),
        )
        page.goto(pages[name].as_uri())
        if folder := os.environ.get("PAGE_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/{name}-{width}-{scheme}-{media}.png", full_page=True)
        assert not problems, "a script error or a request to the network"
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["one", "two"])
def test_the_page_is_readable_and_accessible(opened, name, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(name, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "scrolls horizontally"
    for part in (".words", ".number", ".bar", ".limits", ".summary"):
        for element in page.locator(part).all():
            box = element.bounding_box()
            assert element.is_visible() and box["x"] >= 0 and box["x"] + box["width"] <= width, part
    found = Axe().run(page).response["violations"]
    assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []


@pytest.mark.parametrize("width", [800, 390])
def test_words_and_bars_are_printed(opened, width):
    page = opened("one", width, media="print")
    assert page.locator(".words:visible").count() == page.locator(".bar:visible").count() == 19
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not page.locator("audio").is_visible()


def test_rows_are_buttons_and_the_curve_has_a_text_equivalent(opened):
    page = opened("one")
    row = page.locator(".row").nth(3)
    row.focus()
    page.keyboard.press("Enter")
    assert (
        row.get_attribute("aria-pressed") == "true"
        and page.locator('.row[aria-pressed="true"]').count() == 1
    )
    assert (
        "Pedal, sparse/dry to saturated/wet, over time. Windows of 8 s lie between"
        in page.locator("svg").get_attribute("aria-label")
    )
    times = page.evaluate("recordings[0].times.length")
    assert page.locator("tbody tr").count() == times > 1
    assert "percentile" in page.locator(".moments").inner_text()


def test_the_sound_plays_and_moves_the_cursor(opened):
    page = opened("one")
    seconds = page.evaluate(
        "new Promise((done) => { const a = document.querySelector('audio'); "
        "a.readyState ? done(a.duration) : a.onloadedmetadata = () => done(a.duration); })"
    )
    assert seconds == pytest.approx(page.evaluate("recordings[0].seconds"), abs=0.1)
    page.locator("svg").click(position={"x": 300, "y": 50})
    assert page.evaluate("document.querySelector('audio').currentTime") > 1
