"""What is shown of a file is what is trained on."""

import json
from pathlib import Path

import pytest
from rich.console import Console

import fedproxy
from fedproxy.cli import data
from fedproxy.data import read_rows
from fedproxy.models.checkpoints import load_tokenizer
from fedproxy.models.encoding import encode

LLM = Path(fedproxy.__file__).parent / "demo" / "llm"
ROWS = [
    {"instruction": "Say hi", "input": "", "output": "Hi!", "topic": "x"},
    {"instruction": "Translate", "input": "Hallo, " * 9, "output": "Hello", "topic": None},
    {"instruction": "Say hi", "input": None, "output": "Hi!", "topic": "y"},
]
TALK = [{"from": who, "value": text} for who, text in (("human", "Q1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "A2"))]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def test_rows_duplicates_and_columns_are_counted(cli, file):
    code, out, _ = cli("data", "check", file, "--json")
    found = json.loads(out)
    assert (code, found["format"], found["rows"], found["duplicates"]) == (0, "JSON", 3, 1)
    assert found["columns"] == {
        "instruction": {"rows": 3, "used": True},
        "input": {"rows": 3, "used": True},
        "output": {"rows": 3, "used": True},
        "topic": {"rows": 3, "used": False},
    }
    assert found["first"][0] == [{"text": "Say hi\n", "counts": False}, {"text": "Hi!", "counts": True}]
    assert "tokens" not in found


def test_tokens_are_those_of_the_training(cli, file):
    code, out, _ = cli("data", "check", file, "--model", LLM, "--max-length", 12, "--rows", 2, "--json")
    found, tokenizer = json.loads(out), load_tokenizer(LLM)
    examples = encode(read_rows(file), tokenizer, max_length=12)
    assert code == 0
    assert found["tokens"] == sum(len(example.ids) for example in examples)
    assert found["counting"] == sum(example.counting for example in examples)
    assert (found["cut"], found["lost"], found["longest"], len(found["first"])) == (1, 0, 12, 2)
    for parts, example in zip(found["first"], examples[:2], strict=True):
        assert "".join(part["text"] for part in parts) == tokenizer.decode(list(example.ids))
        assert [part["counts"] for part in parts] == [False, True]
    _, out, _ = cli("data", "check", file, "--model", LLM, "--no-completion-only-loss", "--json")
    assert json.loads(out)["counting"] == json.loads(out)["tokens"] - 3


def test_turns_count_as_the_table_train_says(cli, tmp_path):
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([{"conversations": TALK}]))
    counted = {}
    for flags in ((), ("--assistant-only-loss",), ("--no-completion-only-loss",)):
        _, out, _ = cli("data", "check", path, "--json", *flags)
        counted[flags] = [part["counts"] for part in json.loads(out)["first"][0]]
    assert list(counted.values()) == [[False, False, False, True], [False, True, False, True], [True] * 4]


def test_what_counts_is_coloured_and_foreign_text_steers_nothing(tmp_path, capsys):
    parts = [{"text": "[red]a[/red]\x1b[2J\n", "counts": False}, {"text": "b\u202e", "counts": True}]
    target = Console(force_terminal=True, color_system="standard", markup=False, width=80)
    target.print(data._shown(parts, True))
    shown = capsys.readouterr().out
    assert "[red]a[/red]�[2J" in shown
    assert "\x1b[32mb�" in shown
    assert "\x1b[2J" not in shown
    assert data._shown(parts, False).plain == "[red]a[/red]�[2J\n⟦b�⟧"


def test_what_is_for_people_names_columns_that_are_left_out(cli, file):
    code, out, told = cli("data", "check", file, "--model", LLM, "--max-length", 12)
    assert (code, out) == (0, "")
    assert "topic" in told
    assert "⟦" in told


@pytest.mark.parametrize(("content", "code"), [('[{"question": "a", "answer": "b"}]', 3), ("[", 3), (None, 3)])
def test_a_file_that_cannot_be_used_is_one_error(cli, tmp_path, content, code):
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_text(content)
    found, out, told = cli("data", "check", path)
    assert (found, out) == (code, "")
    assert "rows.json" in told
    assert ("question" in told) is (content is not None and "question" in content)
