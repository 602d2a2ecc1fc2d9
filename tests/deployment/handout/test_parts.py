import hashlib
import json
import os

import pytest

from fedproxy.artifacts import Manifest, write_json
from fedproxy.deployment.handout.parts import Listing, describe, opened
from fedproxy.errors import ArtifactError, UsageError
from tests.test_side_files import STRANGERS

PART = 1 << 20


def test_a_listing_by_hand(proxy):
    listing = describe(proxy, PART)
    assert [file.name for file in listing.files] == ["config.json", "fedproxy.json", "merges.txt", "model.safetensors"]
    weights = listing.files[3]
    content = (proxy / "model.safetensors").read_bytes()
    assert [(part.offset, part.length) for part in weights.parts] == [(k * PART, PART) for k in range(5)] + [
        (5 * PART, 12345)
    ]
    for part in weights.parts:
        assert part.sha256 == hashlib.sha256(content[part.offset : part.offset + part.length]).hexdigest()
    assert listing.files[2].parts == ()
    assert listing.sha256 == hashlib.sha256(listing.content).hexdigest()
    assert Listing.parse(json.loads(listing.content)) == listing


def test_the_identity_is_that_of_every_byte(proxy):
    first = describe(proxy, PART).sha256
    assert describe(proxy, PART).sha256 == first
    content = bytearray((proxy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (proxy / "model.safetensors").write_bytes(content)
    assert describe(proxy, PART).sha256 != first


@pytest.mark.parametrize("part_bytes", [0, (1 << 20) - 1, 2 << 30])
def test_impossible_part_sizes(proxy, part_bytes):
    with pytest.raises(UsageError, match="part_bytes"):
        describe(proxy, part_bytes)


def test_only_a_proxy_is_handed_out(proxy):
    Manifest("fused", "0" * 64, 4, [0, 3]).write(proxy)
    with pytest.raises(ArtifactError, match="only a proxy"):
        describe(proxy)
    (proxy / "fedproxy.json").unlink()
    with pytest.raises(ArtifactError, match=r"fedproxy\.json"):
        describe(proxy)


def make_odd(kind, path, outside):
    if kind == "link out":
        path.symlink_to(outside)
    elif kind == "link in":
        path.symlink_to(path.with_name("config.json"))
    elif kind == "hard link":
        path.hardlink_to(outside)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)


ODD = ["link out", "link in", "hard link", "folder", "pipe"]


@pytest.mark.parametrize("name", ["vocab.txt", "generation_config.json", "tokenizer.json", "LICENSE"])
@pytest.mark.parametrize("kind", ODD)
def test_nothing_but_plain_files_leaves(proxy, tmp_path, kind, name):
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    make_odd(kind, proxy / name, outside)
    with pytest.raises(ArtifactError, match=name):
        describe(proxy)


@pytest.mark.parametrize("kind", ODD)
def test_weights_are_plain_files_too(proxy, tmp_path, kind):
    outside = (proxy / "model.safetensors").rename(tmp_path / "model.safetensors")
    make_odd(kind, proxy / "model.safetensors", outside)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        describe(proxy)


def handed_out(proxy):
    return {file.name for file in describe(proxy).files}


@pytest.mark.parametrize(
    "name", [*STRANGERS, ".secret", ".secret.py", "a b", "own.py", "model-00001-of-00002.safetensors"]
)
def test_what_is_on_no_list_stays(proxy, name, tmp_path):
    before = handed_out(proxy)
    (proxy / name).write_text("secret")
    assert handed_out(proxy) == before
    (proxy / name).unlink()
    (proxy / name).symlink_to(tmp_path / "secret")
    assert handed_out(proxy) == before


def test_what_transformers_reads_and_licences_leave(proxy):
    files = {"tokenizer.model", "tokenizer.model.v3", "vocab.json", "chat_template.jinja", "LICENSE", "NOTICE.txt"}
    for name in files:
        (proxy / name).write_text("{}")
    assert files < handed_out(proxy)


def test_of_weights_only_the_shards_of_the_index_leave(proxy):
    (proxy / "model.safetensors").rename(proxy / "model-00001-of-00002.safetensors")
    (proxy / "model-00002-of-00002.safetensors").write_bytes(b"of the LLM")
    weights = {"weight_map": {"model.w": "model-00001-of-00002.safetensors"}, "metadata": {"from": "/home/owner"}}
    write_json(proxy / "model.safetensors.index.json", weights)
    shard, index = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
    assert handed_out(proxy) == {"config.json", "fedproxy.json", "merges.txt", shard, index}
    assert json.loads(contents(proxy)[index]) == {"weight_map": {"model.w": shard}, "metadata": {}}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_leaves_only_if_the_settings_name_some_beside_them(proxy, name):
    (proxy / "own.py").write_text("")
    write_json(proxy / name, {"auto_map": {"AutoConfig": "org/llm--own.Config"}})
    assert "own.py" not in handed_out(proxy)
    write_json(proxy / name, {"auto_map": {"AutoConfig": "own.Config"}})
    assert "own.py" in handed_out(proxy)


def entry(name="a", size=2, parts=((0, 2, "0" * 64),)):
    return {"name": name, "size": size, "parts": [list(part) for part in parts]}


BAD = {
    "no table": [],
    "another format": {"format": 2, "files": [entry()]},
    "no files": {"format": 1, "files": []},
    "more": {"format": 1, "files": [entry()], "path": "/x"},
    "files no list": {"format": 1, "files": {"a": 1}},
    "traversal": {"format": 1, "files": [entry("../a")]},
    "absolute": {"format": 1, "files": [entry("/etc/passwd")]},
    "folder": {"format": 1, "files": [entry("a/b")]},
    "backslash": {"format": 1, "files": [entry("a\\b")]},
    "hidden": {"format": 1, "files": [entry(".complete.json")]},
    "parent": {"format": 1, "files": [entry("..")]},
    "newline": {"format": 1, "files": [entry("a\n")]},
    "null": {"format": 1, "files": [entry("a\0b")]},
    "name no text": {"format": 1, "files": [entry(5)]},
    "twice": {"format": 1, "files": [entry("a"), entry("a")]},
    "twice but for case": {"format": 1, "files": [entry("A"), entry("a")]},
    "order": {"format": 1, "files": [entry("b"), entry("a")]},
    "negative size": {"format": 1, "files": [entry(size=-1, parts=())]},
    "huge": {"format": 1, "files": [entry(size=1 << 60, parts=())]},
    "boolean size": {"format": 1, "files": [entry(size=True, parts=((0, 1, "0" * 64),))]},
    "gap": {"format": 1, "files": [entry(parts=((1, 1, "0" * 64),))]},
    "overlap": {"format": 1, "files": [entry(parts=((0, 2, "0" * 64), (1, 1, "0" * 64)))]},
    "too few bytes": {"format": 1, "files": [entry(size=3)]},
    "empty part": {"format": 1, "files": [entry(parts=((0, 0, "0" * 64), (0, 2, "0" * 64)))]},
    "large part": {"format": 1, "files": [entry(size=2 << 30, parts=((0, 2 << 30, "0" * 64),))]},
    "fractions": {"format": 1, "files": [entry(parts=((0, 2.0, "0" * 64),))]},
    "hash as path": {"format": 1, "files": [entry(parts=((0, 2, "../../listing"),))]},
    "hash too long": {"format": 1, "files": [entry(parts=((0, 2, "0" * 65),))]},
    "many files": {"format": 1, "files": [entry(f"f{k:05}", 0, ()) for k in range(1001)]},
}


@pytest.mark.parametrize("kind", BAD)
def test_hostile_listings(kind):
    with pytest.raises(ArtifactError, match="listing of the proxy's files"):
        Listing.parse(BAD[kind])


def contents(proxy):
    with opened(proxy) as handles:
        return {name: os.pread(handle, 1 << 24, 0) for name, handle in handles.items()}


def test_no_path_leaves(proxy):
    paths = {"_name_or_path": "/home/owner/llm", "text_config": {"any": ["/home/owner/llm"]}, "a": 1}
    write_json(proxy / "config.json", paths | {"attn_implementation": "org/kernel"})
    write_json(proxy / "tokenizer_config.json", {"name_or_path": "/home/owner", "any": "/home/x", "eos_token": "</s>"})
    write_json(proxy / "special_tokens_map.json", {"any": "/home/owner", "eos_token": "</s>"})
    write_json(proxy / "generation_config.json", {"any": "/home/owner", "top_k": 5})
    settings = {"heal": {"settings": {"text": "/home/owner/public.txt"}}}
    Manifest("proxy", "0" * 64, 4, [0, 3], settings=settings).write(proxy)
    found = contents(proxy)
    assert not [name for name, content in found.items() if b"/home/" in content]
    assert json.loads(found["config.json"]) == {"text_config": {}, "a": 1}
    assert json.loads(found["tokenizer_config.json"]) == {"eos_token": "</s>"}
    assert json.loads(found["special_tokens_map.json"]) == {"eos_token": "</s>"}
    assert json.loads(found["generation_config.json"]) == {"top_k": 5}
    assert "/home/owner/llm" in (proxy / "config.json").read_text()


def test_what_needs_no_cleaning_leaves_to_the_byte(proxy):
    (proxy / "tokenizer_config.json").write_text('{"eos_token":    "</s>"}')
    (proxy / "tokenizer.json").write_text('{"path":    "/home/owner"}')
    assert contents(proxy)["config.json"] == (proxy / "config.json").read_bytes()
    assert contents(proxy)["tokenizer_config.json"] == (proxy / "tokenizer_config.json").read_bytes()
    assert contents(proxy)["tokenizer.json"] == (proxy / "tokenizer.json").read_bytes()
