"""Reports in a real browser: they fit narrow screens, and tables and pictures obey the keyboard alone."""

import shutil

import pytest

from slimstep.eval.pages.run_page import write_report
from slimstep.eval.pages.runs import read_run
from tests.eval.run_stub import write_run

sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "prune_unet")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[400, 1400])
def page(request, browser, report):
    page, errors = browser.new_page(viewport={"width": request.param, "height": 900}), []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(f"file://{report}/report.html")
    yield page
    assert not errors
    page.close()


def column(table, k):
    return table.evaluate(f"table => [...table.rows].slice(1).map(row => row.cells[{k}].textContent.trim())")


def test_nothing_but_tables_and_charts_is_wider_than_the_screen(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_every_picture_has_words_for_those_who_do_not_see_it(page):
    pictures = page.locator("img")
    assert pictures.count() and all(pictures.nth(k).get_attribute("alt") for k in range(pictures.count()))


def test_tables_are_sorted_by_the_keyboard_up_down_and_back(page, report):
    table = page.locator(".scroll > table").first
    before, heading = column(table, 0), table.locator("th").nth(1)
    parameters = dict(zip(before, (model.parameters for model in read_run(report).models), strict=True))
    orders = []
    for arrow in ("ascending", "descending", "none"):
        heading.locator("button").press("Enter")
        assert heading.get_attribute("aria-sort") == arrow
        orders.append(column(table, 0))
    upwards, downwards, back = ([parameters[name] for name in order] for order in orders)
    assert upwards == sorted(upwards) == downwards[::-1] and back == list(parameters.values()) != upwards
    assert orders[2] == before


def test_what_was_not_measured_stays_last(page):
    table = page.locator(".scroll > table").first
    heading = table.locator("th").last
    for _ in range(2):
        heading.locator("button").press("Enter")
        assert column(table, table.locator("th").count() - 1)[-1] == "–"


def test_a_slider_uncovers_the_teacher_under_the_student(page):
    figure, slider = page.locator("figure .two").first, page.locator("input.split").first
    first, second = (figure.locator("span").nth(k) for k in (0, 1))
    assert not slider.is_visible() and first.bounding_box()["x"] < second.bounding_box()["x"]
    page.locator("input.overlay").press("Space")
    assert slider.is_visible() and first.bounding_box() == second.bounding_box()
    clips = []
    for key in ("Home", "End"):
        slider.press(key)
        clips.append(second.evaluate("span => getComputedStyle(span).clipPath"))
    assert clips == ["inset(0px 0px 0px 0%)", "inset(0px 0px 0px 100%)"]
