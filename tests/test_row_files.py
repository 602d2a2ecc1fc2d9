"""Every format holds the same rows, and says of a broken file which row it is."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedproxy.data import partition, read_rows
from fedproxy.errors import ArtifactError, MissingExtraError, UsageError
from fedproxy.models.encoding import encode
from fedproxy.public_text import read_documents
from fedproxy.row_files import format_of, numbered_rows
from tests.conftest import make_tokenizer
from tests.models.test_turns import PLAIN, TALK, TOOLS

PAIRS = [
    {"prompt": 'What, is\n"this"?', "completion": " 007", "label": "a"},
    {"prompt": "", "completion": "NA", "label": "b"},
    {"prompt": "ünï\tcode", "completion": "1.0\n", "label": "a"},
]
ALPACA = [
    {"instruction": "Say hi", "input": "", "output": "Hi!", "text": "Below is an instruction …"},
    {"instruction": "Translate", "input": "Hallo", "output": "Hello", "text": "Below is …"},
]
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"days": "two", "where": None}}}
CHATS = [
    {"messages": TALK, "tools": TOOLS},
    {"messages": TALK[1:2] + TALK[-1:], "tools": None},
    {"messages": [TALK[1], {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": TOOLS},
]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello"},
            {"from": "tool", "value": "wet"},
            {"from": "gpt", "value": "So."},
        ]
    },
]
TEXTS = [{"text": "one"}, {"text": 'two, "2"\n\nlines'}]
KINDS = {"pairs": PAIRS, "alpaca": ALPACA, "chats": CHATS, "sharegpt": SHAREGPT, "texts": TEXTS}


def cell(value):
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def write_csv(path, rows, separator=","):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator)
    writer.writerow(rows[0])
    writer.writerows([cell(row[name]) for name in rows[0]] for row in rows)
    path.write_text(text.getvalue(), newline="")


WRITERS = {
    "a.jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode())),
    "lines.json": lambda path, rows: datasets.Dataset.from_list(rows).to_json(path),
    "a.json": lambda path, rows: path.write_text("\ufeff \n" + json.dumps(rows, indent=1, ensure_ascii=False) + "\n"),
    "a.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "a.csv": write_csv,
    "a.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "A.PARQUET": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
    "splits": lambda path, rows: datasets.DatasetDict(
        {"test": datasets.Dataset.from_list(rows[:1]), "train": datasets.Dataset.from_list(rows)}
    ).save_to_disk(path),
}


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@pytest.fixture
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_tokens_of_json_lines(kind: str, tmp_path: Path) -> None:
    rows, tokenizer = KINDS[kind], make_tokenizer()
    tokenizer.chat_template = PLAIN
    found = {}
    for name, write in WRITERS.items():
        write(tmp_path / name, rows)
        found[name] = [
            encode(read_rows(tmp_path / name), tokenizer, max_length=9999, assistant_only=only)
            for only in (False, True)
        ]
        read = read_rows(tmp_path / name)
        assert [row.get("label") for row in read] == [row.get("label") for row in rows]
        assert read_documents(tmp_path / name)[0] == read_documents(tmp_path / "a.jsonl")[0]
    assert [name for name, examples in found.items() if examples != found["a.jsonl"]] == []
    assert len(found["a.jsonl"][0]) == len(rows)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS.filter(bool)}), min_size=1, max_size=5))
def test_any_text_comes_back_from_every_text_format(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv"):
        WRITERS[name](tmp_path / name, rows)
        assert read_rows(tmp_path / name) == rows


def test_conversations_with_tools_are_rendered_as_transformers_renders_them(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN
    WRITERS["A.PARQUET"](tmp_path / "a.parquet", CHATS[:2])
    for row, example in zip(
        CHATS[:2], encode(read_rows(tmp_path / "a.parquet"), tokenizer, max_length=9999), strict=True
    ):
        expected = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], return_dict=False)
        assert example.ids.tolist() == expected


def test_names_of_fields_mean_the_same() -> None:
    assert read_rows(ALPACA) == [
        {"prompt": "Say hi\n", "completion": "Hi!"},
        {"prompt": "Translate\nHallo\n", "completion": "Hello"},
    ]
    assert read_rows(SHAREGPT[:1]) == [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    ]
    assert read_rows([{"instruction": "a", "output": "b", "id": 7}]) == [{"prompt": "a\n", "completion": "b", "id": 7}]
    [row] = read_rows([{"messages": json.dumps(TALK), "tools": json.dumps(TOOLS)}])
    assert (row["messages"][1], row["tools"]) == (TALK[1], TOOLS)


def test_rows_of_alpaca_without_an_output_are_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    for empty in ("", None):
        caplog.clear()
        assert read_rows([*ALPACA, {**ALPACA[0], "output": empty}]) == read_rows(ALPACA)
        assert "row 3" in caplog.text
    with pytest.raises(ArtifactError, match="row 1: output is empty"):
        read_rows([{**ALPACA[0], "output": ""}])


def test_a_null_is_a_field_that_is_not_there_unless_written_in_the_arguments_as_json() -> None:
    given = {"role": "assistant", "content": None, "name": None, "tool_calls": [CALL]}
    [row] = read_rows([{"messages": [TALK[1], given], "tools": None, "text": None, "label": None}])
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"days": "two"}
    assert row["messages"][1].keys() == {"role", "content", "tool_calls"}
    assert row.keys() == {"messages", "tools", "label"} - {"tools"}
    written = {"type": "function", "function": {"name": "rain", "arguments": json.dumps({"where": None})}}
    [row] = read_rows([{"messages": [TALK[1], {"role": "assistant", "tool_calls": [written]}]}])
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"where": None}


def test_clients_divide_a_table_by_its_label(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "completion": str(i), "label": i % 2} for i in range(40)]
    shares = []
    for name in ("a.jsonl", "a.csv", "A.PARQUET"):
        WRITERS[name](tmp_path / name, [{**row, "label": str(row["label"])} for row in rows])
        shares.append(partition(read_rows(tmp_path / name), 3, "dirichlet", 0.1))
    assert shares[0] == shares[1] == shares[2]


GOOD = b'{"prompt": "a", "completion": "b"}'
BROKEN = {
    "array, syntax": ("a.json", b"[" + GOOD + b', {"prompt": }]', "row 2"),
    "array, cut short": ("a.json", b"[" + GOOD + b"," + GOOD[:20], "row 2"),
    "array, no end": ("a.json", b"[" + GOOD + b"," + GOOD, "row 2: the end of the file"),
    "array, no comma": ("a.json", b"[" + GOOD + b" " + GOOD + b"]", "row 1: '{'"),
    "array, comma at the end": ("a.json", b"[" + GOOD + b",]", "row 2"),
    "array, text behind": ("a.json", b"[" + GOOD + b"] x", "after row 1"),
    "array, bytes": ("a.json", b"[" + GOOD + b', {"text": "\xff"}]', "row 2"),
    "array, half a pair": ("a.json", b"[" + GOOD + b', {"text": "\\ud800"}]', "row 2"),
    "array, a number": ("a.json", b"[" + GOOD + b", 7]", "row 2: a JSON int"),
    "array, deep": ("a.json", b"[" + GOOD + b"," + b"[" * 100_000, "row 2"),
    "array, a field": ("a.json", b"[" + GOOD + b', {"prompt": "a"}]', "row 2: completion is missing"),
    "array, empty": ("a.json", b" [ ] ", "holds no rows"),
    "csv, empty": ("a.csv", b"", "holds no rows"),
    "csv, header alone": ("a.csv", b"prompt,completion\n", "holds no rows"),
    "csv, a cell more": ("a.csv", b'prompt,completion\n"a\nb",c\n\nd,e,f\n', "row 2 (line 5): 3 cells"),
    "csv, a cell less": ("a.csv", b"prompt,completion\na,b\nc\n", "row 2 (line 3): 1 cells"),
    "csv, quote": ("a.csv", b'prompt,completion\na,b\n"c"d,e\n', "row 2 (line 3)"),
    "csv, quote without end": ("a.csv", b'prompt,completion\na,b\nc,"d\n\n', "row 2 (line 3): a quote is opened"),
    "csv, bytes": ("a.csv", b"prompt,completion\na,b\nc,\xff\n", "line 3"),
    "csv, a name twice": ("a.csv", b"prompt,prompt\na,b\n", "'prompt'"),
    "csv, a cell over two lines": (
        "a.csv",
        b'prompt,completion\na,b\n"c\nd",\n',
        "row 2 (line 3): completion is empty",
    ),
    "csv, semicolons": ("a.csv", b"prompt;completion\na;b\n", "line 1: the header is one column, 'prompt;completion'"),
    "csv, semicolons and quotes": ("a.csv", b'prompt;completion\n"a";"b"\n', "not ';'"),
    "csv, a space in the header": ("a.csv", b"prompt, completion\na,b\n", "[' completion', 'prompt']"),
    "csv, UTF-16": ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), "line 1 is not UTF-8"),
    "tsv, commas": ("a.tsv", b'prompt,completion\n"a","b"\n', "not ','"),
    "another end of the name": ("a.xlsx", b"PK\x03\x04", "none of the ends .jsonl, .json, .csv"),
    "alpaca, null": ("a.jsonl", b'{"instruction": null, "output": "a"}', "line 1: a row with the fields ['output']"),
    "csv, empty answer": ("a.csv", b"prompt,completion\na,b\nc,\n", "row 2 (line 3): completion is empty"),
    "csv, messages": ("a.csv", b"messages\n[}\n", "row 1 (line 2): messages is not valid JSON"),
    "tsv, a cell less": ("a.tsv", b"prompt\tcompletion\na\tb\nc\n", "row 2 (line 3): 1 cells"),
    "csv, gzip": ("a.csv.gz", b"no gzip", "no gzip file"),
    "parquet": ("a.parquet", b"PAR1 no", "no Parquet file"),
    "parquet, empty": ("a.parquet", b"", "no Parquet file"),
    "alpaca": ("a.jsonl", b'{"instruction": "a", "output": 3}', "line 1: output is a int"),
    "alpaca, no output": ("a.jsonl", b'{"instruction": "a", "input": "b"}', "line 1: output is missing"),
    "sharegpt": ("a.jsonl", b'{"conversations": [{"from": "bing", "value": "b"}]}', "line 1: message 1 is from 'bing'"),
    "sharegpt, no list": ("a.jsonl", b'{"conversations": 3}', "line 1: conversations is a int"),
    "sharegpt, no value": ("a.jsonl", b'{"conversations": [{"from": "gpt"}]}', "line 1: message 1 is no object"),
    "tools": (
        "a.jsonl",
        b'{"messages": [{"role": "assistant", "content": "a"}], "tools": ["f"]}',
        "line 1: tool 1 is a str",
    ),
    "two formats": ("a.jsonl", b'{"messages": [], "conversations": []}', "['conversations', 'messages']"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_error_with_file_and_row(case: str, tmp_path: Path) -> None:
    name, content, said = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=re.escape(said)) as caught:
        read_rows(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_row_of_a_table_that_is_no_text_or_too_little_is_named(tmp_path: Path) -> None:
    good = [{"prompt": "a", "completion": "b"}] * 1500
    WRITERS["A.PARQUET"](tmp_path / "a.parquet", [*good, {"prompt": "a", "completion": None}])
    with pytest.raises(ArtifactError, match=r"a\.parquet, row 1501: completion is missing"):
        read_rows(tmp_path / "a.parquet")
    bad = pa.array([b"a", b"b", b"\xff"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "bytes.parquet")
    with pytest.raises(ArtifactError, match=r"bytes\.parquet, row 3: .*utf-8"):
        read_rows(tmp_path / "bytes.parquet")
    assert len(read_rows(tmp_path / "bytes.parquet", limit=2)) == 2
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "twice.parquet")
    with pytest.raises(ArtifactError, match="'text'"):
        read_rows(tmp_path / "twice.parquet")


@pytest.mark.usefixtures("quiet")
def test_damaged_tables_and_folders_are_one_error(tmp_path: Path) -> None:
    WRITERS["A.PARQUET"](tmp_path / "a.parquet", [{"text": f"{i} {'x' * i}"} for i in range(1000)])
    content = (tmp_path / "a.parquet").read_bytes()
    damaged = content[:200] + bytes(255 - byte for byte in content[200:400]) + content[400:]
    for number, broken in enumerate((content[:-20], content[20:], damaged, content[: len(content) // 2])):
        (tmp_path / f"{number}.parquet").write_bytes(broken)
        with pytest.raises(ArtifactError, match=rf"{number}\.parquet"):
            read_rows(tmp_path / f"{number}.parquet")
    WRITERS["saved"](tmp_path / "saved", TEXTS)
    [file] = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict({"a": datasets.Dataset.from_list(TEXTS), "b": datasets.Dataset.from_list(TEXTS)}).save_to_disk(
        tmp_path / "splits"
    )
    for name, said in (
        ("saved", "damaged"),
        ("empty", "save_to_disk"),
        ("splits", "a, b"),
        ("gone.parquet", "No such"),
    ):
        with pytest.raises(ArtifactError, match=said) as caught:
            read_rows(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    assert len(read_rows(tmp_path / "splits" / "b")) == 2


def test_rows_are_read_no_further_than_asked(tmp_path: Path) -> None:
    for name, content in {
        "a.json": b"[" + GOOD + b", broken",
        "a.csv": b"prompt,completion\na,b\nbroken\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert [row for _, row in numbered_rows(tmp_path / name, 1)] == [{"prompt": "a", "completion": "b"}]
        with pytest.raises(UsageError, match="limit of 0"):
            next(numbered_rows(tmp_path / name, 0))


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    WRITERS["a.csv"](tmp_path / "a.csv", [{"text": "long " * 100_000}])
    assert read_rows(tmp_path / "a.csv") == [{"text": "long " * 100_000}]


def test_without_the_library_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    WRITERS["A.PARQUET"](tmp_path / "a.parquet", TEXTS)
    for name in ("datasets", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for path in (tmp_path / "a.parquet", tmp_path):
        with pytest.raises(MissingExtraError, match=r"fedproxy\[data\]"):
            read_rows(path)


def test_formats_have_names(tmp_path: Path) -> None:
    names = {"a.jsonl": "JSON Lines", "a": "JSON Lines", "a.CSV.gz": "CSV", "a.parquet": "Parquet", "a.json": "JSON"}
    assert {name: format_of(tmp_path / name) for name in names} == names
    assert format_of(tmp_path) == "folder of datasets"
