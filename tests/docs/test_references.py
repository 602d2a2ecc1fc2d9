"""Files, functions and tests that the documents name exist, and links lead somewhere."""

import re

import pytest

from tests.docs.terminal import DOCS, PAGES

ROOT = DOCS.parent
NAMED = re.compile(
    r"`((?:tests|src|benchmarks|scripts|aggregation|compression|deployment|federation|fusion|models)/[\w/.-]+\.py)(?:::(\w+))?"
)
FOLDERS = re.compile(r"`((?:tests|src|docs|benchmarks|scripts|experiments)/[\w./-]+)")
TRUE_TODAY = [page for page in PAGES if page != DOCS / "log.md"]
"""All but the log, of which each entry was true on its date."""


@pytest.mark.parametrize("page", TRUE_TODAY, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    for path, name in NAMED.findall(text):
        file = next((file for file in (ROOT / path, ROOT / "src" / "fedproxy" / path) if file.is_file()), None)
        assert file is not None, path
        assert not name or f"def {name}(" in file.read_text(encoding="utf-8"), f"{path}::{name}"
    for path in FOLDERS.findall(text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not heading or heading in headings(file.read_text(encoding="utf-8")), target


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)}


def test_pages_name_tests():
    assert sum(bool(test) for page in PAGES for _, test in NAMED.findall(page.read_text(encoding="utf-8"))) > 20
