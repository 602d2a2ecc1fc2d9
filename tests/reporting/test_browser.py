"""The pages in headless Chromium: nothing on the console, nothing wider than the window, tables that sort.

axe-core's rules are checked, too: of the version that comes with the tests, or of the `axe.min.js` that AXE_CORE names.
"""

import html as escapes
import importlib.resources
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedproxy.reporting import compare_runs, report, report_comparison

from .methods_sample import methods_sample, parse
from .sample import sample, write_conflict
from .test_methods import BROWSER_NAMES
from .test_page import HOSTILE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
AXE = os.environ.get("AXE_CORE") or importlib.resources.files("axe_core_python") / "axe.min.js"

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"), pytest.mark.long]


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


def browse(page: Path | str, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The elements of a page, a file or an address, after its scripts ran, and the lines of its console."""
    address = page if isinstance(page, str) else f"file://{page}"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", "--virtual-time-budget=5000", *flags]
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=600, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def ask(page: Path, folder: Path, width: int, question: str, *flags: str, scripts: str = "") -> object:
    """What the (possibly async) expression `question` says of the page as `doc` in a frame of this width."""
    text = page.read_text()
    if scripts:  # the page's own policy forbids any script but its own
        text = re.sub("<meta http-equiv=[^>]*>", "", text).replace("</body>", f"<script>{scripts}</script></body>")
    frame = folder / "frame.html"
    frame.write_text(
        f'<iframe id="f" width="{width}" height="900" style="border: 0" srcdoc="{escapes.escape(text)}"></iframe>'
        "<output></output><script>f.onload = async () => { const doc = f.contentDocument; "
        f'document.querySelector("output").textContent = JSON.stringify(await ({question})); }}</script>'
    )
    found, console = browse(frame, folder / "profile", "--window-size=1600,1000", *flags)
    assert console == []
    return json.loads(escapes.unescape(re.search("<output>(.*?)</output>", found, re.DOTALL)[1]))


@pytest.mark.parametrize("number", range(5))
def test_no_word_on_the_console(pages, tmp_path, number):
    found, console = browse(pages[number], tmp_path / "profile")
    assert console == []
    assert "<button" in found


@pytest.mark.parametrize("width", [320, 400, 1400])
@pytest.mark.parametrize("number", range(5))
def test_nothing_is_wider_than_the_window(pages, tmp_path, number, width):
    assert ask(pages[number], tmp_path, width, "doc.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("number", [0, 2, 3])
def test_no_text_of_a_figure_lies_outside_it(pages, tmp_path, number):
    question = """[...doc.querySelectorAll("svg text")].filter((text) => {
        const own = text.getBoundingClientRect(), all = text.closest("svg").getBoundingClientRect();
        return own.right > all.right + 6 || own.left < all.left - 6;
    }).map((text) => text.textContent)"""
    assert ask(pages[number], tmp_path, 1400, question) == []


def test_a_table_is_sorted_by_its_headers_and_back(pages, tmp_path):
    question = """(() => {
        const table = doc.querySelector("table.sortable"), head = table.tHead.rows[0].cells[4], seen = [];
        for (let click = 0; click < 2; click++) {
            head.querySelector("button").click();
            seen.push([head.ariaSort, ...[...table.tBodies[0].rows].map((row) => row.cells[4].textContent)]);
        }
        return [...seen, table.tFoot.textContent.trim().slice(0, 4)];
    })()"""
    found = ask(pages[0], tmp_path, 1400, question)
    assert found == [
        ["descending", "91.0", "89.0", "84.0", "81.0"],
        ["ascending", "81.0", "84.0", "89.0", "91.0"],
        "Mean",
    ]


def test_methods_are_sorted_by_their_accuracy(pages, tmp_path):
    question = """(() => {
        const table = doc.querySelector("table.sortable");
        table.tHead.rows[0].cells[1].querySelector("button").click();
        return [...table.tBodies[0].rows].map((row) => [row.cells[0].textContent, row.cells[1].textContent]);
    })()"""
    found = ask(pages[3], tmp_path, 1400, question)
    means = {row.method: row.accuracy.mean for row in parse(methods_sample()).rows}
    assert [name for name, _ in found] == sorted(means, key=lambda name: -means[name])
    assert all(text.startswith(f"{100 * means[name]:.1f} (") for name, text in found)


@pytest.mark.parametrize("width", [400, 1400])
def test_names_of_a_trade_off_do_not_touch(pages, tmp_path, width):
    question = """["exposed", "bytes"].map((name) => {
        const texts = [...doc.querySelectorAll(`svg[aria-labelledby="${name}-title"] text`)];
        const boxes = texts.map((text) => [text.textContent, text.getBoundingClientRect()]);
        return boxes.flatMap(([text, a], i) => boxes.slice(i + 1).filter(([, b]) =>
            Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.25 * Math.min(a.height, b.height)
        ).map(([other]) => [text, other]));
    })"""
    assert ask(pages[3], tmp_path, width, question) == [[], []]


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_both_themes_are_drawn(pages, tmp_path, scheme):
    question = "getComputedStyle(doc.body).backgroundColor"
    found = ask(pages[0], tmp_path, 1400, question, f"--blink-settings=preferredColorScheme={scheme}")
    assert found == ("rgb(20, 23, 27)", "rgb(255, 255, 255)")[scheme]


@pytest.mark.parametrize(
    ("number", "scheme"),
    [(number, scheme) for number in range(5) for scheme in (0, 1) if (number, scheme) != (3, 1)],  # 4 has its template
)
def test_axe_finds_nothing(pages, tmp_path, number, scheme):
    question = (
        "f.contentWindow.axe.run(doc).then((done) => done.violations.map((v) => [v.id, v.nodes.map((n) => n.html)]))"
    )
    flags = (f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=60000")
    assert ask(pages[number], tmp_path, 1400, question, *flags, scripts=Path(str(AXE)).read_text()) == []
