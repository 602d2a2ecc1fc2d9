import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedproxy.data import partition, read_objects, read_rows
from fedproxy.errors import ArtifactError, UsageError

PAIR = {"prompt": "2 + 2 =", "completion": " 4"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
TEXT = {"text": "Once upon a time."}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("row", [PAIR, CHAT, TEXT, {**PAIR, "label": 3}, {**PAIR, "prompt": ""}])
def test_rows_come_back_as_written(tmp_path: Path, row: dict[str, object]) -> None:
    assert read_rows(write(tmp_path / "rows.jsonl", row, row)) == [row, row]


def test_conversational_prompt_and_completion_are_messages_with_the_answer_last(tmp_path: Path) -> None:
    messages = CHAT["messages"]
    row = {"prompt": messages[:1], "completion": messages[1:], "label": 3}
    assert read_rows(write(tmp_path / "rows.jsonl", row, CHAT)) == [{**CHAT, "label": 3}, CHAT]


def test_blank_lines_byte_order_mark_and_missing_last_newline_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TEXT).encode() + b"\r\n\r\n" + json.dumps(TEXT).encode())
    assert read_rows(path) == [TEXT, TEXT]


def test_gz_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(PAIR).encode()))
    assert read_rows(path) == [PAIR]


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", PAIR, {**PAIR, "completion": " 5"})
    path.write_text(path.read_text() + "{broken\n")
    assert read_rows(path, limit=1) == [PAIR]
    assert len(read_rows(path, limit=2)) == 2
    with pytest.raises(UsageError, match="limit of 0"):
        read_rows(path, limit=0)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{broken", "not valid JSON"),
        ("[1]", "list, where an object"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "known formats"),
        ('{"question": "a"}', "known formats"),
        ('{"prompt": "a"}', "completion is missing"),
        ('{"completion": "a"}', "prompt is missing"),
        ('{"prompt": "a", "completion": 4}', "completion is a int"),
        ('{"prompt": null, "completion": "4"}', "prompt is missing"),
        ('{"prompt": "a", "completion": ""}', "completion is empty"),
        ('{"prompt": "a", "completion": "\\ud800"}', "surrogates not allowed"),
        ('{"prompt": "a", "completion": "b", "text": "c"}', "several formats"),
        ('{"prompt": [], "completion": []}', "completion holds 0 messages, where one"),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}', "completion is a list"),
        ('{"prompt": [], "completion": [{"role": "user", "content": "b"}]}', "last message has the role 'user'"),
        ('{"prompt": [], "completion": [1]}', "message 1 is no object"),
        ('{"prompt": [], "completion": [1], "messages": []}', "several formats"),
        ('{"text": ["a"]}', "text is a list"),
        ('{"text": ""}', "text is empty"),
        ('{"messages": "hi"}', "messages is not valid JSON"),
        ('{"messages": {}}', "no list of messages"),
        ('{"messages": []}', "empty one"),
        ('{"messages": ["hi"]}', "message 1 is no object"),
        ('{"messages": [{"role": "user"}]}', "message 1 is no object"),
        ('{"messages": [{"role": 1, "content": "a"}]}', "role of message 1 is a int"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "message 1 is no object"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "last message has the role 'user'"),
        ('{"text": "a"}', "rows above are of the format prompt and completion"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, bad: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIR) + "\n\n" + bad + "\n")
    with pytest.raises(ArtifactError) as caught:
        read_rows(path)
    assert f"{path}, line 3" in str(caught.value)
    assert said in str(caught.value)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ArtifactError, match="line 1"):
        read_rows(path)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_an_artifact_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="holds no rows"):
        read_rows(path)


def test_a_missing_file_a_directory_and_a_broken_gz_are_artifact_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ArtifactError, match=re.escape(str(path))):
            read_rows(path)
    whole = gzip.compress(json.dumps(TEXT).encode() * 100)
    for content in (b"no gzip", whole[:-12], whole[:15] + b"\xff\xff" + whole[17:]):
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"rows\.jsonl\.gz"):
            read_rows(path)


def test_objects_of_any_shape_are_read(tmp_path: Path) -> None:
    rows = [{"sentence": "a", "label": 1}, {"other": [1, 2]}]
    assert read_objects(write(tmp_path / "rows.jsonl", *rows)) == rows


def labelled(counts: dict[str, int]) -> list[dict[str, object]]:
    return [{"prompt": f"{label} {i}", "completion": label} for label, count in counts.items() for i in range(count)]


@given(
    rows=st.integers(1, 60),
    clients=st.integers(1, 12),
    scheme=st.sampled_from(["iid", "dirichlet"]),
    alpha=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_shares_are_disjoint_covering_nonempty_and_reproducible(
    rows: int, clients: int, scheme: str, alpha: float, seed: int
) -> None:
    data = [{"prompt": str(i), "completion": str(i), "label": i % 3} for i in range(max(rows, clients))]
    shares = partition(data, clients, scheme, alpha, seed)
    assert len(shares) == clients
    assert all(shares)
    assert sorted(int(row["prompt"]) for share in shares for row in share) == list(range(len(data)))
    assert shares == partition(data, clients, scheme, alpha, seed)


def test_iid_shares_differ_by_one_row_at_most() -> None:
    sizes = [len(share) for share in partition(labelled({"a": 11}), 3)]
    assert max(sizes) - min(sizes) <= 1


def test_another_seed_gives_another_division() -> None:
    rows = labelled({"a": 50, "b": 50})
    assert partition(rows, 4, seed=0) != partition(rows, 4, seed=1)
    assert partition(rows, 4, "dirichlet", seed=0) != partition(rows, 4, "dirichlet", seed=1)


def purity(shares: list[list[dict[str, object]]]) -> float:
    """The share of rows that carry their client's commonest label."""
    return sum(Counter(row["completion"] for row in share).most_common(1)[0][1] for share in shares) / 1000


def test_small_alpha_separates_labels_and_large_alpha_mixes_them() -> None:
    rows = labelled(dict.fromkeys("abcd", 250))
    skewed = purity(partition(rows, 4, "dirichlet", alpha=0.05))
    mixed = purity(partition(rows, 4, "dirichlet", alpha=100.0))
    assert skewed > 0.6 > 0.35 > mixed


def test_label_is_the_field_named_else_label_else_the_answer() -> None:
    pairs = [{"prompt": str(i), "completion": str(i), "label": i % 2, "topic": i % 2} for i in range(40)]
    by_default = partition(pairs, 3, "dirichlet", 0.1)
    assert by_default == partition(pairs, 3, "dirichlet", 0.1, label="topic")
    assert by_default != partition(pairs, 3, "dirichlet", 0.1, label="completion")
    bare = [{"prompt": str(i), "completion": str(i % 20)} for i in range(40)]
    chats = [{"messages": [{"role": "assistant", "content": row["completion"]}]} for row in bare]
    shares = [[row["completion"] for row in share] for share in partition(bare, 3, "dirichlet", 0.1)]
    assert [[r["messages"][0]["content"] for r in s] for s in partition(chats, 3, "dirichlet", 0.1)] == shares


def test_free_text_is_no_label() -> None:
    rows = [{"prompt": str(i), "completion": f"answer {min(i, 20)}"} for i in range(40)]
    with pytest.raises(UsageError, match=r'40 rows have 21 different answers.*scheme = "iid"'):
        partition(rows, 3, "dirichlet")
    assert len(partition(rows, 3, "iid")) == 3
    assert len(partition([*rows, *rows[:2]], 3, "dirichlet")) == 3
    assert len(partition([{**row, "label": row["prompt"]} for row in rows], 3, "dirichlet")) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clients": 5}, "4 rows cannot be divided among 5 clients"),
        ({"clients": 0}, "0 clients"),
        ({"clients": 2, "scheme": "dirichlet", "alpha": 0.0}, "alpha is 0.0"),
        ({"clients": 2, "scheme": "dirichlet", "alpha": float("nan")}, "alpha is nan"),
        ({"clients": 2, "scheme": "shards"}, "unknown partition scheme 'shards'"),
        ({"clients": 2, "scheme": "dirichlet", "label": "topic"}, "row 1 has no field 'topic'"),
    ],
)
def test_impossible_divisions_are_usage_errors(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        partition(labelled({"a": 4}), **options)  # type: ignore[arg-type]


def test_plain_text_has_no_label_to_divide_by() -> None:
    with pytest.raises(UsageError, match="no answer to divide by"):
        partition([TEXT, TEXT], 2, "dirichlet")
    assert len(partition([TEXT, TEXT], 2)) == 2
