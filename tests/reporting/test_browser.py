"""The pages in headless Chromium: nothing on the console, nothing wider than the window, tables that sort, and
nothing that axe finds."""

import json
from pathlib import Path

import pytest

from fedproxy.reporting import compare_runs, report, report_comparison
from tests.browser import needs_chromium

from .methods_sample import methods_sample, parse
from .sample import sample, write_conflict
from .test_methods import BROWSER_NAMES
from .test_page import HOSTILE

pytestmark = [needs_chromium, pytest.mark.long]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> list[Path]:
    """A run's page, one with long and hostile names, and the two compared; methods compared, and with such names."""
    folder = tmp_path_factory.mktemp("runs")
    runs = []
    for name, raw in (("plain", sample(rounds=3)), ("hostile", sample(HOSTILE, rounds=2, tasks=HOSTILE[:4]))):
        runs.append(folder / name)
        runs[-1].mkdir()
        (runs[-1] / "results.json").write_text(json.dumps(raw))
        write_conflict(runs[-1], rounds=2)
        report(runs[-1])
    compared = []
    names = {"seeds": [0], "tasks": BROWSER_NAMES, "clients": BROWSER_NAMES, "rounds": 2}
    for name, raw in (("methods", methods_sample()), ("names", methods_sample(BROWSER_NAMES, **names))):
        (folder / f"{name}.json").write_text(json.dumps(raw))
        compared.append(report_comparison(folder / f"{name}.json", folder / f"{name}.html"))
    return [*(run / "report.html" for run in runs), compare_runs(runs, folder / "comparison.html"), *compared]


@pytest.mark.parametrize("number", range(5))
def test_no_word_on_the_console(browser, pages, number):
    with browser.open(pages[number]) as page:
        page.pass_time(5)
        assert "<button" in page.html()


@pytest.mark.parametrize("width", [320, 400, 1400])
@pytest.mark.parametrize("number", range(5))
def test_nothing_is_wider_than_the_window(browser, pages, number, width):
    with browser.open(pages[number], width=width) as page:
        assert page.overflow() == 0


@pytest.mark.parametrize("number", [0, 2, 3])
def test_no_text_of_a_figure_lies_outside_it(browser, pages, number):
    question = """[...document.querySelectorAll("svg text")].filter((text) => {
        const own = text.getBoundingClientRect(), all = text.closest("svg").getBoundingClientRect();
        return own.right > all.right + 6 || own.left < all.left - 6;
    }).map((text) => text.textContent)"""
    with browser.open(pages[number]) as page:
        assert page.ask(question) == []


def test_a_table_is_sorted_by_its_headers_and_back(browser, pages):
    question = """(() => {
        const table = document.querySelector("table.sortable"), head = table.tHead.rows[0].cells[4], seen = [];
        for (let click = 0; click < 2; click++) {
            head.querySelector("button").click();
            seen.push([head.ariaSort, ...[...table.tBodies[0].rows].map((row) => row.cells[4].textContent)]);
        }
        return [...seen, table.tFoot.textContent.trim().slice(0, 4)];
    })()"""
    with browser.open(pages[0]) as page:
        found = page.ask(question)
    assert found == [
        ["descending", "91.0", "89.0", "84.0", "81.0"],
        ["ascending", "81.0", "84.0", "89.0", "91.0"],
        "Mean",
    ]


def test_methods_are_sorted_by_their_accuracy(browser, pages):
    question = """(() => {
        const table = document.querySelector("table.sortable");
        table.tHead.rows[0].cells[1].querySelector("button").click();
        return [...table.tBodies[0].rows].map((row) => [row.cells[0].textContent, row.cells[1].textContent]);
    })()"""
    with browser.open(pages[3]) as page:
        found = page.ask(question)
    means = {row.method: row.accuracy.mean for row in parse(methods_sample()).rows}
    assert [name for name, _ in found] == sorted(means, key=lambda name: -means[name])
    assert all(text.startswith(f"{100 * means[name]:.1f} (") for name, text in found)


@pytest.mark.parametrize("width", [400, 1400])
def test_names_of_a_trade_off_do_not_touch(browser, pages, width):
    question = """["exposed", "bytes"].map((name) => {
        const texts = [...document.querySelectorAll(`svg[aria-labelledby="${name}-title"] text`)];
        const boxes = texts.map((text) => [text.textContent, text.getBoundingClientRect()]);
        return boxes.flatMap(([text, a], i) => boxes.slice(i + 1).filter(([, b]) =>
            Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.25 * Math.min(a.height, b.height)
        ).map(([other]) => [text, other]));
    })"""
    with browser.open(pages[3], width=width) as page:
        assert page.ask(question) == [[], []]


@pytest.mark.parametrize(("dark", "colour"), [(True, "rgb(20, 23, 27)"), (False, "rgb(255, 255, 255)")])
def test_both_themes_are_drawn(browser, pages, dark, colour):
    with browser.open(pages[0], dark=dark) as page:
        assert page.ask("getComputedStyle(document.body).backgroundColor") == colour


@pytest.mark.parametrize(
    ("number", "dark"),
    [
        (number, dark) for number in range(5) for dark in (True, False) if (number, dark) != (3, False)
    ],  # 4 has its template
)
def test_axe_finds_nothing(browser, pages, number, dark):
    with browser.open(pages[number], dark=dark) as page:
        assert page.axe() == []
