"""The records of decisions: each has its parts, and the first page lists them all."""

import re

import pytest

from tests.docs.terminal import DOCS

INDEX = DOCS / "decisions" / "index.md"
RECORDS = [page for page in sorted(INDEX.parent.glob("*.md")) if page != INDEX]


@pytest.mark.parametrize("record", RECORDS, ids=lambda page: page.name)
def test_a_record_has_its_parts(record):
    text = record.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequence", "Evidence"]
    assert re.search(r"^\*\*Status:\*\* \S", text, re.MULTILINE)
    evidence = text.partition("## Evidence")[2]
    assert re.search(r"`(tests|benchmarks|experiments|pyproject)", evidence), "nothing shows it"


def test_the_first_page_lists_every_record_by_its_title():
    listed = dict(re.findall(r"^\| \[(.*)\]\((\w+\.md)\) \|", INDEX.read_text(encoding="utf-8"), re.MULTILINE))
    titles = {page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# "): page.name for page in RECORDS}
    assert listed == titles
