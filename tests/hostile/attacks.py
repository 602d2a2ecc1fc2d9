"""Files made to do harm: safetensors that lie about themselves, indices that point elsewhere, impossible settings.

Each attack is a row: its name → a function that damages something that was whole.
"""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedproxy.tensor_files import load_tensors, save_tensors

MIB = 1 << 20
HEADER_LIMIT = 32 * MIB
ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

Attack = Callable[[Path], object]


def safetensors(header: object, body: bytes = bytes(8)) -> bytes:
    """A safetensors file with that header, given as bytes or as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _entry(**changes: Any) -> bytes:
    return safetensors({"w": {**ENTRY, **changes}})


def _sparse(length: int) -> Attack:
    """A file of `length` bytes that takes no disk, all of it announced as header."""

    def write(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", length - 8) + b"{")
        os.truncate(path, length)

    return write


def _repeated(path: Path, size: int, before: bytes, piece: bytes, after: bytes, start: bytes = b"") -> None:
    """Write `start` and almost `size` bytes that repeat `piece`, a little at a time."""
    left = (size - len(before) - len(after)) // len(piece)
    with open(path, "wb") as file:
        file.write(start + before)
        while left:
            count = min(left, MIB)
            file.write(piece * count)
            left -= count
        file.write(after)


def _filled(before: str, piece: str, after: str, size: int = HEADER_LIMIT) -> Attack:
    """A header of exactly `size` bytes that repeats `piece`, and no data."""

    def write(path: Path) -> None:
        pad = " " * ((size - len(before) - len(after)) % len(piece))
        _repeated(path, size, before.encode(), piece.encode(), (after + pad).encode(), struct.pack("<Q", size))

    return write


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


class _Payload:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("pickle-was-run",)


_W = json.dumps(ENTRY)
_CONTENTS: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header one byte too long": struct.pack("<Q", 3) + b"{}",
    "header of 2**64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "pickle": pickle.dumps(_Payload()),
    "old pickle": pickle.dumps(_Payload(), protocol=0),
    "zip": b"PK\x03\x04" + bytes(100),
    "empty header": safetensors(b""),
    "no JSON": safetensors(b"{{{{"),
    "no UTF-8": safetensors(b'{"\xff\xfe": %s}' % _W.encode()),
    "list": safetensors([1, 2]),
    "null": safetensors(None),
    "list as entry": safetensors({"w": [1, 2]}),
    "null as entry": safetensors({"w": None}),
    "empty entry": safetensors({"w": {}}),
    "two documents": safetensors(f'{{"w":{_W}}}{{"v":{_W}}}'.encode()),
    "comma at the end": safetensors(f'{{"w":{_W},}}'.encode()),
    "no end": safetensors(f'{{"w":{_W}'.encode()),
    "overlap": safetensors({"w": ENTRY, "v": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
    "the same bytes twice": safetensors({"w": ENTRY, "v": ENTRY}),
    "gap": safetensors({"w": ENTRY, "v": {**ENTRY, "data_offsets": [12, 20]}}, bytes(20)),
    "out of range": _entry(data_offsets=[8, 16]),
    "far out of range": _entry(data_offsets=[2**62, 2**62 + 8]),
    "negative offsets": _entry(data_offsets=[-8, 0]),
    "offsets into the header": safetensors({"w": {**ENTRY, "data_offsets": [-16, -8]}, "v": ENTRY}),
    "backward offsets": _entry(data_offsets=[8, 0]),
    "one offset": _entry(data_offsets=[8]),
    "three offsets": _entry(data_offsets=[0, 4, 8]),
    "offsets as text": _entry(data_offsets=["0", "8"]),
    "offsets as floats": _entry(data_offsets=[0.0, 8.0]),
    "offsets as booleans": _entry(dtype="U8", shape=[1], data_offsets=[False, True]),
    "offsets as NaN": safetensors(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}'),
    "shape as booleans": _entry(shape=[True, 2]),
    "shape as floats": _entry(shape=[2.0]),
    "shape as text": _entry(shape="2"),
    "shape as number": _entry(shape=2),
    "negative shape": _entry(shape=[-1, -2]),
    "gigantic shape": _entry(shape=[2**62]),
    "shape that overflows to the size": _entry(shape=[2**61 + 1, 2]),
    "shape of a thousand digits": safetensors(
        b'{"w":{"dtype":"F32","shape":[1%s],"data_offsets":[0,8]}}' % (b"0" * 1000)
    ),
    "gigantic number of dimensions": _entry(shape=[1] * 100_000),
    "unknown dtype": _entry(dtype="F99"),
    "dtype as list": _entry(dtype=["F32"]),
    "dtype missing": safetensors({"w": {"shape": [2], "data_offsets": [0, 8]}}),
    "truncated data": safetensors({"w": ENTRY}, bytes(7)),
    "data after the end": safetensors({"w": ENTRY}, bytes(9)),
    "duplicate name": safetensors(f'{{"w":{_W},"w":{_W}}}'.encode()),
    "duplicate name, escaped": safetensors(f'{{"w":{_W},"\\u0077":{_W}}}'.encode()),
    "duplicate key in an entry": safetensors(
        b'{"w":{"dtype":"F32","shape":[99],"shape":[2],"data_offsets":[0,8]}}',
    ),
    "duplicate metadata": safetensors(f'{{"__metadata__":{{}},"w":{_W},"__metadata__":{{}}}}'.encode()),
    "metadata that are no text": safetensors({"__metadata__": {"format": 1}, "w": ENTRY}),
    "metadata as list": safetensors({"__metadata__": ["pt"], "w": ENTRY}),
    "half a surrogate pair": safetensors(f'{{"\\ud800":{_W}}}'.encode()),
    "nested lists": safetensors(b"[" * 100_000 + b"]" * 100_000),
    "nested entry": safetensors(b'{"w":' * 100_000 + b"1" + b"}" * 100_000),
    "nested shape": safetensors(b'{"w":{"dtype":"F32","shape":%s2%s}}' % (b"[" * 2000, b"]" * 2000)),
    "nested metadata": safetensors(b'{"__metadata__":{"a":%s%s}}' % (b"[" * 100_000, b"]" * 100_000)),
}


def _writer(content: bytes) -> Attack:
    return lambda path: path.write_bytes(content)


TENSOR_FILES: dict[str, Attack] = {
    **{name: _writer(content) for name, content in _CONTENTS.items()},
    "directory": lambda path: (path.unlink(missing_ok=True), path.mkdir()),
    "pipe": _fifo,
}
"""Attacks on a safetensors file."""

GIGANTIC_TENSOR_FILES: dict[str, Attack] = {
    "header of 64 GiB": _sparse(64 * 1024 * MIB),
    "header over the limit": _sparse(HEADER_LIMIT + 9),
    "lists up to the limit": _filled('{"w":[', "[],", "[]]}"),
    "lists in an entry": _filled('{"w":{"shape":[', "[],", "[]]}}"),
    "tables up to the limit": _filled('{"w":[', "{},", "{}]}"),
    "a long name": _filled('{"', "a", f'":{_W}}}'),
    "a name without end": _filled('{"', '\\"', ""),
    "text in an entry": _filled('{"w":{"dtype":"', "F", '"}}'),
    "nothing but space": _filled("{", " ", ""),
    "metadata up to the limit": _filled('{"__metadata__":{"a":[', "[],", "[]]}}"),
    "metadata within its limit": _filled('{"__metadata__":{"a":[', "[],", "[]]}}", 4 * MIB),
}
"""Attacks whose harm is the memory or the time that believing them would take."""


def shards(checkpoint: Path) -> list[Path]:
    """The weight files of a sharded checkpoint."""
    return sorted(checkpoint.glob("model-*.safetensors"))


def _index(change: Callable[[dict[str, Any]], Any]) -> Attack:
    """Change the index; `change` returns the new one."""

    def write(checkpoint: Path) -> None:
        file = checkpoint / "model.safetensors.index.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return write


def _all_to(place: str) -> Attack:
    """Move the first shard to `place`, counted from the checkpoint, and let the index follow it there."""

    def write(checkpoint: Path) -> None:
        first = shards(checkpoint)[0]
        target = checkpoint / place
        target.parent.mkdir(exist_ok=True)
        first.rename(target)
        name = str(target.resolve()) if place == "../absolute" else place
        _index(lambda index: _renamed(index, first.name, name))(checkpoint)

    return write


def _renamed(index: dict[str, Any], old: str, new: object) -> dict[str, Any]:
    return {**index, "weight_map": {k: new if v == old else v for k, v in index["weight_map"].items()}}


def _one_value(value: object) -> Attack:
    return _index(lambda index: {**index, "weight_map": {**index["weight_map"], "lm_head.weight": value}})


def _tensor_in_two_shards(checkpoint: Path) -> None:
    first, second = shards(checkpoint)[:2]
    name, tensor = next(iter(load_tensors(first).items()))
    save_tensors(second, {**load_tensors(second), name: tensor})


def _tensor_lost(checkpoint: Path) -> None:
    first = shards(checkpoint)[0]
    tensors = load_tensors(first)
    tensors.popitem()
    save_tensors(first, tensors)


def _exchanged(checkpoint: Path) -> None:
    first, second = shards(checkpoint)[:2]
    shutil.move(first, checkpoint / "x")
    shutil.move(second, first)
    shutil.move(checkpoint / "x", second)


def _config(change: Callable[[dict[str, Any]], Any]) -> Attack:
    def write(checkpoint: Path) -> None:
        file = checkpoint / "config.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return write


def _config_value(**changes: Any) -> Attack:
    return _config(lambda config: {**config, **changes})


def _text(name: str, content: str) -> Attack:
    return lambda checkpoint: (checkpoint / name).write_text(content)


def _remote_code(checkpoint: Path) -> None:
    (checkpoint / "evil.py").write_text("import os\nos.mkdir('remote-code-was-run')\n")
    _config_value(
        model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    )(checkpoint)  # fmt: skip


CHECKPOINTS: dict[str, Attack] = {
    "index: up and out": _all_to("../outside.safetensors"),
    "index: absolute": _all_to("../absolute"),
    "index: subfolder": _all_to("sub/model.safetensors"),
    "index: the folder itself": _one_value("."),
    "index: its parent": _one_value(".."),
    "index: no name": _one_value(""),
    "index: NUL": _one_value("model\0.safetensors"),
    "index: another file": _one_value("config.json"),
    "index: missing shard": _one_value("model-00099-of-00099.safetensors"),
    "index: null": _one_value(None),
    "index: number": _one_value(3),
    "index: list": _one_value(["model-00001-of-00003.safetensors"]),
    "index: table": _one_value({"a": "model-00001-of-00003.safetensors"}),
    "index: weight_map is a list": _index(lambda index: {**index, "weight_map": list(index["weight_map"])}),
    "index: weight_map is text": _index(lambda index: {**index, "weight_map": "model.safetensors"}),
    "index: weight_map is null": _index(lambda index: {**index, "weight_map": None}),
    "index: weight_map is empty": _index(lambda index: {**index, "weight_map": {}}),
    "index: no weight_map": _index(lambda index: {"metadata": {}}),
    "index: is a list": _index(lambda index: [index]),
    "index: is null": _index(lambda index: None),
    "index: no JSON": _text("model.safetensors.index.json", "{"),
    "index: no UTF-8": lambda path: (path / "model.safetensors.index.json").write_bytes(b'{"weight_map": "\xff"}'),
    "index: nested": _text("model.safetensors.index.json", "[" * 100_000),
    "index: unknown tensor": _index(
        lambda index: {**index, "weight_map": {**index["weight_map"], "x": "model-00001-of-00003.safetensors"}}
    ),
    "a tensor in two shards": _tensor_in_two_shards,
    "a shard lacks a tensor": _tensor_lost,
    "two shards exchanged": _exchanged,
    "a shard is no file": lambda path: _fifo(shards(path)[0]),
    "a shard is missing": lambda path: shards(path)[0].unlink(),
    "a shard without tensors": lambda path: shards(path)[0].write_bytes(safetensors({}, b"")),
    "nothing but a pickle": lambda path: [
        *(file.unlink() for file in path.glob("model*")),
        (path / "pytorch_model.bin").write_bytes(_CONTENTS["pickle"]),
    ],
    "config: missing": lambda path: (path / "config.json").unlink(),
    "config: list": _config(lambda config: [config]),
    "config: text": _config(lambda config: "llama"),
    "config: null": _config(lambda config: None),
    "config: empty": _config(lambda config: {}),
    "config: no JSON": _text("config.json", "{"),
    "config: no UTF-8": lambda path: (path / "config.json").write_bytes(b'{"model_type": "\xff"}'),
    "config: nested": _text("config.json", '{"a":' * 100_000),
    "config: unknown family": _config_value(model_type="no-such-family"),
    "config: family is a list": _config_value(model_type=["llama"]),
    "config: remote code": _remote_code,
    "config: fewer blocks than the files hold": _config_value(num_hidden_layers=5),
    "config: one block more than the files hold": _config_value(num_hidden_layers=7),
    "config: no blocks": _config_value(num_hidden_layers=0),
    "config: negative blocks": _config_value(num_hidden_layers=-6),
    "config: blocks as text": _config_value(num_hidden_layers="6"),
    "config: blocks as float": _config_value(num_hidden_layers=6.5),
    "config: blocks as list": _config_value(num_hidden_layers=[6]),
    "config: blocks null": _config_value(num_hidden_layers=None),
    "config: no heads": _config_value(num_attention_heads=0),
    "config: another width": _config_value(hidden_size=64),
    "config: negative width": _config_value(hidden_size=-32),
    "config: unknown activation": _config_value(hidden_act="no-such-activation"),
}
"""Attacks on a checkpoint of three shards."""


def _large(name: str, before: bytes, piece: bytes, after: bytes) -> Attack:
    return lambda checkpoint: _repeated(checkpoint / name, 200_000_000, before, piece, after)


GIGANTIC_CHECKPOINTS: dict[str, Attack] = {
    "config: 10**9 blocks": _config_value(num_hidden_layers=10**9),
    "config: 10**18 blocks": _config_value(num_hidden_layers=10**18),
    "config: width 2**40": _config_value(hidden_size=2**40, num_attention_heads=2**20, head_dim=2**20),
    "config: 10**15 tokens": _config_value(vocab_size=10**15),
    "config: 10**12 heads": _config_value(num_attention_heads=10**12),
    "config: 200 MB": _large("config.json", b'{"a":"', b"a", b'"}'),
    "config: 200 MB of lists": _large("config.json", b'{"a":[', b"[],", b"1]}"),
    "index: 200 MB of lists": _large("model.safetensors.index.json", b'{"weight_map":{"a":[', b"[],", b"1]}}"),
    "index: 200 MB": _large("model.safetensors.index.json", b'{"weight_map":{"a":"', b"a", b'"}}'),
    "a shard's header of 64 GiB": lambda path: _sparse(64 * 1024 * MIB)(shards(path)[0]),
    "a shard's header at the limit": lambda path: GIGANTIC_TENSOR_FILES["tables up to the limit"](shards(path)[0]),
}
"""Attacks on a checkpoint whose harm is the memory or the time that believing them would take."""


def _json_value(name: str, **changes: Any) -> Attack:
    def write(directory: Path) -> None:
        record = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**record, **changes}))

    return write


def _manifest(**llm: Any) -> Attack:
    def write(directory: Path) -> None:
        file = directory / "fedproxy.json"
        record = json.loads(file.read_text())
        file.write_text(json.dumps({**record, "llm": {**record["llm"], **llm}}))

    return write


ADAPTERS: dict[str, Attack] = {
    "config: list": _text("adapter_config.json", "[]"),
    "config: no JSON": _text("adapter_config.json", "{"),
    "config: nested": _text("adapter_config.json", "[" * 100_000),
    "config: rank 2**62": _json_value("adapter_config.json", r=2**62),
    "config: rank true": _json_value("adapter_config.json", r=True),
    "config: rank as text": _json_value("adapter_config.json", r="4"),
    "config: alpha of a thousand digits": _json_value("adapter_config.json", lora_alpha=10**1000),
    "config: alpha true": _json_value("adapter_config.json", lora_alpha=True),
    "config: alpha NaN": _json_value("adapter_config.json", lora_alpha=float("nan")),
    "config: other kind": _json_value("adapter_config.json", peft_type="LOHA"),
    "manifest: list": _text("fedproxy.json", "[]"),
    "manifest: null": _text("fedproxy.json", "null"),
    "manifest: nested": _text("fedproxy.json", "[" * 100_000),
    "manifest: LLM is a list": _json_value("fedproxy.json", llm=[]),
    "manifest: LLM is null": _json_value("fedproxy.json", llm=None),
    "manifest: kind is a list": _json_value("fedproxy.json", kind=[]),
    "manifest: 10**18 blocks": _manifest(blocks=10**18),
    "manifest: blocks true": _manifest(blocks=True),
    "manifest: no layers": _json_value("fedproxy.json", layer_map=[]),
    "manifest: layers is a table": _json_value("fedproxy.json", layer_map={"0": 1}),
    "manifest: layers as text": _json_value("fedproxy.json", layer_map=["1", "2", "5"]),
    "manifest: layers of all sorts": _json_value("fedproxy.json", layer_map=[1, "2", None]),
    "manifest: negative layer": _json_value("fedproxy.json", layer_map=[-1, 2, 5]),
    "manifest: settings is a list": _json_value("fedproxy.json", settings=["scale"]),
    "manifest: no pickle is named": _json_value("fedproxy.json", format="pickle"),
}
"""Attacks on an adapter's directory."""

GIGANTIC_ADAPTERS: dict[str, Attack] = {
    name: lambda path, attack=attack: attack(path / "adapter_model.safetensors")  # type: ignore[misc]
    for name, attack in GIGANTIC_TENSOR_FILES.items()
} | {
    "config: 200 MB of lists": _large("adapter_config.json", b'{"a":[', b"[],", b"1]}"),
    "manifest: 200 MB of lists": _large("fedproxy.json", b'{"a":[', b"[],", b"1]}"),
}
"""Attacks on an adapter's directory whose harm is the memory or the time that believing them would take."""
