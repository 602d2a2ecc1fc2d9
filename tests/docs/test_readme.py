"""The first page: what it shows works, and what it says of results is what the results say."""

import importlib.util
import sys
import tomllib

import pytest

from fedproxy.config import parse_experiment
from tests.docs.terminal import DOCS, PAGES, fenced

README = DOCS.parent / "README.md"
TABLES = {"llm", "compress", "heal", "client", "train", "federate", "fuse", "evaluate", "compare"}
EXPERIMENTS = [
    pytest.param(parsed, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (language, text) in enumerate(fenced(page))
    if language == "toml" and (parsed := tomllib.loads(text)).keys() & TABLES
]


def test_it_opens_with_what_it_is_for_and_the_two_commands():
    opening = README.read_text(encoding="utf-8").partition("![")[0]
    assert "make demo" in opening
    assert "make test" in opening
    assert opening.count("\n") < 12


@pytest.mark.parametrize("given", EXPERIMENTS)
def test_experiments_on_pages_are_accepted(given, tmp_path):
    """Files that are left out are put beside what a page shows of one."""
    for name in ("public.txt", "bank.jsonl"):
        (tmp_path / name).touch()
    whole = {"llm": {"path": "llm"}, "compress": {"calibration": "public.txt"}}
    whole["client"] = [{"name": name, "data": "bank.jsonl"} for name in ("bank", "media", "travel")]
    parse_experiment(whole | given, source="the page", folder=tmp_path)


def test_figures_are_rendered_from_results(monkeypatch):
    folder = DOCS.parent / "benchmarks"
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    spec = importlib.util.spec_from_file_location("render", folder / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    for path, content in render.pages().items():
        assert (DOCS.parent / path).read_text(encoding="utf-8") == content, f"{path}: run make docs"
