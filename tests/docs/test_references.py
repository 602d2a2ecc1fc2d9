"""Files and tests that the documents name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in ROOT.glob("docs/*.md")))
]
NAMED = re.compile(
    r"`((?:tests|src|benchmarks|scripts|aggregation|compression|deployment|federation|fusion|models)/[\w/.-]+\.py)(?:::(\w+))?"
)
HISTORY = {"docs/decisions.md"}
"""What was true on its date."""


@pytest.mark.parametrize(
    "page", [page for page in PAGES if str(page.relative_to(ROOT)) not in HISTORY], ids=lambda page: page.name
)
def test_what_a_page_names_exists(page):
    for path, test in NAMED.findall(page.read_text(encoding="utf-8")):
        file = next((file for file in (ROOT / path, ROOT / "src" / "fedproxy" / path) if file.is_file()), None)
        assert file is not None, path
        assert not test or f"def {test}(" in file.read_text(encoding="utf-8"), f"{path}::{test}"


def test_pages_name_tests():
    assert sum(bool(test) for page in PAGES for _, test in NAMED.findall(page.read_text(encoding="utf-8"))) > 20
