"""The browser of the tests sees what is wrong with a page: each kind of fault on one page of its own is found."""

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser import Browser, needs_chromium

pytestmark = [needs_chromium, pytest.mark.slow]
POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'"
POLICY += "; script-src 'unsafe-inline'\">"
FAULTS = {
    "a word": ("<script>console.log('so be it')</script>", "so be it"),
    "a warning": ("<script>console.warn('take care')</script>", "take care"),
    "an uncaught error": ("<script>nowhere.to.be.found</script>", "nowhere is not defined"),
    "a rejected promise": ("<script>Promise.reject(new Error('not kept'))</script>", "not kept"),
    "an error in a while": ("<script>setTimeout(() => { throw Error('late') }, 4000)</script>", "late"),
    "a picture from elsewhere": (f"{POLICY}<img alt='' src='http://localhost:9/x.png'>", "Content Security Policy"),
    "a fetch": (f"{POLICY}<script>fetch('http://localhost:9/').catch(() => 0)</script>", "Content Security Policy"),
    "a script": ("<script src='gone.js'></script>", "gone.js"),
    "a frame's word": ("""<iframe title="f" srcdoc="<script>console.log('within')</script>"></iframe>""", "within"),
}


def write(folder: Path, body: str, head: str = "") -> Path:
    page = folder / "page.html"
    page.write_text(
        f"<!doctype html><html lang='en'><head><title>T</title>{head}</head><body><main>{body}</main></body>"
    )
    return page


@pytest.mark.parametrize("fault", FAULTS)
def test_a_word_on_the_console_fails_the_page(browser: Browser, tmp_path: Path, fault: str) -> None:
    head, says = FAULTS[fault]
    with pytest.raises(AssertionError, match=says), browser.open(write(tmp_path, "<h1>T</h1>", head)) as page:
        page.pass_time(5)


def test_what_a_worker_or_a_frame_of_another_site_says_is_heard(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "worker.js").write_text("console.log('from a worker')")
    (tmp_path / "frame.html").write_text("<script>console.log('from a frame')</script>")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        elsewhere = f"http://localhost:{server.server_port}/frame.html"
        write(tmp_path, f"<iframe src='{elsewhere}'></iframe><script>new Worker('worker.js')</script>")
        with (
            pytest.raises(AssertionError) as found,
            browser.open(f"http://127.0.0.1:{server.server_port}/page.html") as page,
        ):
            page.pass_time(1)
        server.shutdown()
    assert "from a worker" in str(found.value)
    assert "from a frame" in str(found.value)


def test_a_page_without_a_fault_passes(browser: Browser, tmp_path: Path) -> None:
    with browser.open(write(tmp_path, "<h1>T</h1><p>All is well.</p>", POLICY)) as page:
        assert page.axe() == []
        assert page.overflow() == 0
        page.pass_time(5)
        assert "All is well." in page.html()


@pytest.mark.parametrize(("wide", "width", "over"), [(400, 400, 0), (401, 400, 1), (1500, 1400, 100)])
def test_what_is_wider_than_the_window_is_found(
    browser: Browser, tmp_path: Path, wide: int, width: int, over: int
) -> None:
    with browser.open(
        write(tmp_path, f"<div style='width: {wide}px'>T</div>", "<style>body{margin:0}</style>"), width=width
    ) as page:
        assert page.overflow() == over


def test_axe_finds_what_is_wrong_in_the_theme_that_is_shown(browser: Browser, tmp_path: Path) -> None:
    pale = "<style>@media (prefers-color-scheme: dark) { body { background: #222; color: #444 } }</style>"
    page = write(
        tmp_path,
        "<h1>Title</h1><p>Some words.</p><img src='data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA='>",
        pale,
    )
    for dark, rules in ((False, {"image-alt"}), (True, {"image-alt", "color-contrast"})):
        with browser.open(page, dark=dark) as shown:
            assert {rule for rule, *_ in shown.axe()} == rules


def test_an_answer_that_is_an_error_fails(browser: Browser, tmp_path: Path) -> None:
    with browser.open(write(tmp_path, "")) as page:
        assert page.ask("Promise.resolve({ a: [1] })") == {"a": [1]}
        with pytest.raises(AssertionError, match="nowhere"):
            page.ask("nowhere")


def test_a_page_that_is_not_there_fails(browser: Browser, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ERR_FILE_NOT_FOUND"), browser.open(tmp_path / "none.html"):
        pass


def test_a_page_knows_nothing_of_the_one_before(browser: Browser, tmp_path: Path) -> None:
    for _ in range(2):
        with browser.open(write(tmp_path, "")) as page:
            assert page.ask("[localStorage.getItem('a'), localStorage.setItem('a', 1)]")[0] is None
