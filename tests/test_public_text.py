import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models.text_batches import batches
from fedproxy.public_text import draw, read_documents
from tests.conftest import make_tokenizer


def test_plain_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\r\n  \n\n\nthree\n")
    assert read_documents(path) == (["one\ntwo", "three"], hashlib.sha256(path.read_bytes()).hexdigest())


def test_json_lines_of_every_format(tmp_path: Path) -> None:
    rows = [
        {"text": "one"},
        {"prompt": "two ", "completion": "three"},
        {"instruction": "four", "input": "five", "output": "six"},
        {"instruction": "seven", "input": "", "output": "eight"},
        {"instruction": "nine", "output": "ten"},
        {"text": "  "},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    assert read_documents(path)[0] == ["one", "two three", "four\nfive\nsix", "seven\neight", "nine\nten"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_gzip_changes_nothing(tmp_path: Path, name: str) -> None:
    content = b'{"text": "one"}\n'
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    assert read_documents(tmp_path / name) == read_documents(tmp_path / f"{name}.gz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-20], "cannot be read"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"text\n", "holds no rows"),
        ("a.csv", b"text\n  \n", "holds no text"),
        ("a.json", b'[{"text": "a"}, {"messages": [{"role": "user"}]}]', "row 2: message 1"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 3}\n', "line 3: text is no string"),
        ("a.jsonl", b'{"prompt": "a"}', "line 1: completion is missing"),
        ("a.jsonl", b"[1]", "line 1: a JSON list"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_documents(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.txt", tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(ArtifactError, match=re.escape(str(path))):
            read_documents(path)


def test_the_draw_follows_the_seed() -> None:
    documents = [str(i) for i in range(100)]
    assert draw(documents, 10, 0) == draw(documents, 10, 0)
    assert draw(documents, 10, 0) != draw(documents, 10, 1)
    assert len(set(draw(documents, 10, 0))) == 10
    assert draw(documents, 100, 0) == draw(documents, 999, 5) == documents
    with pytest.raises(UsageError, match="samples"):
        draw(documents, 0, 0)


def test_batches_hold_the_tokens_and_mark_the_padding() -> None:
    found = batches(make_tokenizer(), ["abcdef", "ab", "abcd"], max_length=4, batch_size=2)
    assert [batch.attention_mask.tolist() for batch in found] == [[[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 1, 1, 1]]]
    assert found[0].input_ids[0, 2:].tolist() == [256, 256]
    assert torch.equal(found[0].input_ids[1], found[1].input_ids[0])
    with pytest.raises(UsageError, match="at least 1"):
        batches(make_tokenizer(), ["a"], max_length=0, batch_size=2)
    with pytest.raises(ArtifactError, match="no token"):
        batches(make_tokenizer(), [""], max_length=4, batch_size=2)
