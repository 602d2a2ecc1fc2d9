import hashlib
import json
import os

import pytest

from fedproxy.artifacts import Manifest, write_json
from fedproxy.deployment.handout.parts import Listing, describe
from fedproxy.errors import ArtifactError, UsageError

PART = 1 << 20


def test_a_listing_by_hand(proxy):
    listing = describe(proxy, PART)
    assert [file.name for file in listing.files] == ["config.json", "empty.txt", "fedproxy.json", "model.safetensors"]
    weights = listing.files[3]
    content = (proxy / "model.safetensors").read_bytes()
    assert [(part.offset, part.length) for part in weights.parts] == [(k * PART, PART) for k in range(5)] + [
        (5 * PART, 12345)
    ]
    for part in weights.parts:
        assert part.sha256 == hashlib.sha256(content[part.offset : part.offset + part.length]).hexdigest()
    assert listing.files[1].parts == ()
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


def make_odd(kind, folder, outside):
    path = folder / "odd"
    if kind == "link out":
        path.symlink_to(outside)
    elif kind == "link in":
        path.symlink_to(folder / "config.json")
    elif kind == "link as configuration":
        path = folder / "generation_config.json"
        path.symlink_to(outside)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = folder / "a b"
        path.write_text("")
    return path


@pytest.mark.parametrize("kind", ["link out", "link in", "link as configuration", "folder", "pipe", "name"])
def test_nothing_but_plain_files_leaves(proxy, tmp_path, kind):
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    path = make_odd(kind, proxy, outside)
    with pytest.raises(ArtifactError, match=path.name):
        describe(proxy)


def test_hidden_files_stay(proxy):
    (proxy / ".secret").write_text("secret")
    assert ".secret" not in {file.name for file in describe(proxy).files}


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


def test_no_path_leaves(proxy):
    paths = {"_name_or_path": "/home/owner/llm", "text_config": {"_name_or_path": "/home/owner/llm"}, "a": 1}
    write_json(proxy / "config.json", paths)
    write_json(proxy / "tokenizer_config.json", {"name_or_path": "/home/owner", "special_tokens_map_file": "/home/x"})
    settings = {"heal": {"settings": {"text": "/home/owner/public.txt"}}}
    Manifest("proxy", "0" * 64, 4, [0, 3], settings=settings).write(proxy)
    from fedproxy.deployment.handout.parts import opened

    with opened(proxy) as handles:
        contents = {name: os.pread(handle, 1 << 24, 0) for name, handle in handles.items()}
    assert not [name for name, content in contents.items() if b"/home/" in content]
    assert json.loads(contents["config.json"]) == {"text_config": {}, "a": 1}
    assert "/home/owner/llm" in (proxy / "config.json").read_text()
