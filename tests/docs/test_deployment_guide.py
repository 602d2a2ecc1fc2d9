"""The guide as a reader follows it: every block is typed into the terminal it names, and prints what the page says."""

import re

import pytest

from fedproxy.cli import main
from tests.docs.terminal import DOCS, PAGES, Block, fenced, follow, free_port

GUIDE = DOCS / "deployment.md"
_TERMINAL = re.compile(r"# ((\w+)(?:'s second terminal)?)(: leave it running)?\n")


def blocks() -> list[Block]:
    found: list[Block] = []
    for language, text in fenced(GUIDE):
        if language == "sh":
            head = _TERMINAL.match(text)
            assert head is not None, f"whose terminal is this?\n{text}"
            folder = "." if head[2] == "here" else head[2]
            found.append(Block(text[head.end() :], head[1], folder, stays=head[3] is not None))
        elif language == "text":
            found[-1].prints += text.splitlines()
    return found


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_guide_works_as_written(tmp_path):
    with follow(blocks(), tmp_path, instead={"9443": str(free_port())}) as terminals:
        scores = [float(score) for score in re.findall(r"average\D*(0\.\d+)", terminals["owner"].said)]
        assert len(scores) == 2, terminals["owner"].said
        assert scores[1] > scores[0] + 0.2


COMMAND = re.compile(
    r"fedproxy (keys \w+|data \w+|serve|join|ledger|compress|federate|fuse|evaluate|run|compare|methods|init|doctor)\b"
    r"([^\n`|]*)"
)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name)
def test_every_option_on_the_page_exists(page, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for command, rest in COMMAND.findall(page.read_text()):
        with pytest.raises(SystemExit) as end:
            main([*command.split(), "--help"])
        assert end.value.code == 0, command
        known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
        assert set(re.findall(r"(?<!\S)--[a-z][a-z-]+", rest)) <= known, command
