"""The tutorial as a reader follows it: every block is run in an empty folder, without a network."""

import ast
import json
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

import fedproxy
from tests.docs.terminal import DOCS, PAGES, Block, fenced, follow, free_port

TUTORIAL = DOCS / "tutorial.md"
NOT_RUN = {
    "it fetches torch": "tests have no network; the block before finds all that it names installed",
    "it fetches a model": "tests have no network; the block before copies a model from the package",
    "it needs vLLM and a GPU": "tests have neither; the adapter's form is tested in tests/fusion",
}
"""What blocks that are not run say of themselves, and why that has to be; any other block is run."""
_NOT_RUN = re.compile(r"# not run here: (.*)\n")
_HEAD = re.compile(r"# (?=second|leave)(second terminal)?(?:: )?(leave it running)?\n")


def blocks() -> tuple[list[Block], list[str]]:
    """What is run, and what the rest says of itself."""
    run: list[Block] = []
    excuses: list[str] = []
    for language, text in fenced(TUTORIAL):
        assert language in ("sh", "python", "text"), text
        if language == "text":
            run[-1].prints += text.splitlines()
        elif language == "python":
            run.append(Block(f"python - <<'END OF PROGRAM'\n{text}END OF PROGRAM"))
        elif excuse := _NOT_RUN.match(text):
            excuses.append(excuse[1])
        elif head := _HEAD.match(text):
            run.append(Block(text[head.end() :], head[1] or "reader", stays=head[2] is not None))
        else:
            run.append(Block(text, "reader"))
    return run, excuses


def environment() -> dict[str, str]:
    """No network, and this environment's packages in the reader's own, where `pip install` finds them.

    The page's `pip install` is the real one, in the page's own new environment, and fails if anything that it names or
    needs is not installed here; only the fetching is left out.
    """
    here = [path for path in sys.path if Path(path).name == "site-packages"]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return {
        "PYTHONPATH": os.pathsep.join([str(Path(fedproxy.__file__).parents[1]), *here]),
        "PIP_NO_INDEX": "1",
        "HF_HUB_OFFLINE": "0",
        "no_proxy": "127.0.0.1",
        **nowhere,
    }


def answers(model: str, said: str) -> list[str]:
    return ast.literal_eval(re.findall(rf"\b{model}: (\[.*?\])", said)[-1])


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_tutorial_works_as_written(tmp_path):
    few = "sed -i '/^epochs/a max_steps = 2' experiment.toml\n"  # the run before has trained in full
    compared = "fedproxy compare experiment.toml"
    instead = {"8000": str(free_port()), "seeds = [0, 1]": "seeds = [0]", compared: few + compared}
    with follow(blocks()[0], tmp_path, instead=instead, settings=environment()) as terminals:
        said = terminals["reader"].said
    assert "does not provide the extra" not in said
    scores = json.loads((tmp_path / "run/results.json").read_text())["evaluation"]
    assert scores["fused"]["average"] > scores["llm"]["average"] + 0.15
    assert len(json.loads((tmp_path / "compared/compare.json").read_text())["cells"]) == 4
    adapter = answers("adapter", said)
    assert answers("served", said) == answers("chat", said) == adapter
    right = [given == wanted for given, wanted in zip(adapter, answers("wanted", said), strict=True)]
    assert sum(right) > len(right) / 2


def test_only_what_is_known_is_not_run():
    assert sorted(blocks()[1]) == sorted(NOT_RUN)
    prose = re.sub(r"^```.*?^```$", "", TUTORIAL.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^    \S", prose, re.MULTILINE), "an indented block is never run: fence it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_extras_that_pages_name_exist(page):
    known = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extras in re.findall(r"(?:fedproxy|\.)\[([a-z,]+)\]", page.read_text()):
        assert set(extras.split(",")) <= set(known), extras
