"""The code that asks the tuned LLM is Python, runs without fedproxy, and no foreign text leaves its quotes."""

import ast
from pathlib import Path

import pytest

from fedproxy.reporting import report, use_it

from .sample import parse, sample
from .test_validation import page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "fused").mkdir()
    return tmp_path


def strings(code: str) -> set[object]:
    return {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}


@pytest.mark.parametrize("text", ["say red:", "a\"b'c\nd\\", "\x1b[2J\u202e\r", "<script>", "客户 {x}"])
@pytest.mark.parametrize("special", [True, False])
def test_the_prompt_reaches_the_tokenizer_as_it_is(run: Path, text: str, special: bool) -> None:
    raw = sample(rounds=1) | {"prompt": {"text": text, "special": special, "answer": text}}
    code = use_it(parse(raw), run)
    assert strings(code) >= {text, "llm", str(run / "fused")}
    comment = code.splitlines()[-1].partition("#")[2]
    assert repr(ast.literal_eval(comment.partition(":")[2].strip())) == repr(text)
    assert ("add_special_tokens=False" in code) is not special
    assert len(code.splitlines()) < 15
    assert all(line.isprintable() for line in code.split("\n"))
    assert "<script>1" not in page(run, raw)


def test_without_a_row_a_place_is_left_for_the_prompt(run: Path) -> None:
    assert "YOUR PROMPT" in strings(use_it(parse(sample(rounds=1)), run))


def test_without_a_tuned_llm_there_is_nothing_to_use(tmp_path: Path) -> None:
    assert use_it(parse(sample(rounds=1)), tmp_path) == ""
    assert "Use it" not in page(tmp_path, sample(rounds=1))
    (tmp_path / "fused").mkdir()
    assert "Use it" in report(tmp_path).read_text()
