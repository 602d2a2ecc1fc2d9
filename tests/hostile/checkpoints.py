"""Checkpoints and adapters made to do harm: files that contradict each other, point elsewhere, ask the impossible.

Each attack is a row: its name → a function that damages a whole checkpoint of three shards, or a whole adapter.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedproxy.tensor_files import load_tensors, save_tensors
from tests.hostile.tensor_files import CONTENTS, GIGANTIC_TENSOR_FILES, MIB, Attack, pipe, repeated, safetensors, sparse


def shards(checkpoint: Path) -> list[Path]:
    """The weight files of a sharded checkpoint."""
    return sorted(checkpoint.glob("model-*.safetensors"))


def single(checkpoint: Path) -> Path:
    """Turn a sharded checkpoint into one of a single file, and return that file."""
    tensors = {name: tensor for shard in shards(checkpoint) for name, tensor in load_tensors(shard).items()}
    for file in [checkpoint / "model.safetensors.index.json", *shards(checkpoint)]:
        file.unlink()
    save_tensors(checkpoint / "model.safetensors", tensors)
    return checkpoint / "model.safetensors"


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


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Attack:
    """Change the tensors, without leaving a contradiction between files."""

    def write(checkpoint: Path) -> None:
        file = single(checkpoint)
        save_tensors(file, change(load_tensors(file)))

    return write


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
    "a tensor in two shards": _tensor_in_two_shards,
    "a shard lacks a tensor": _tensor_lost,
    "a shard is no file": lambda path: pipe(shards(path)[0]),
    "a shard is missing": lambda path: shards(path)[0].unlink(),
    "a shard without tensors": lambda path: shards(path)[0].write_bytes(safetensors({}, b"")),
    "no tensors": _tensors(lambda tensors: {}),
    "no head": _tensors(lambda tensors: {k: t for k, t in tensors.items() if k != "lm_head.weight"}),
    "a block is incomplete": _tensors(
        lambda tensors: {k: t for k, t in tensors.items() if k != "model.layers.2.self_attn.q_proj.weight"}
    ),
    "a block is missing": _tensors(lambda tensors: {k: t for k, t in tensors.items() if ".layers.2." not in k}),
    "a weight of another shape": _tensors(
        lambda tensors: {**tensors, "model.layers.2.self_attn.q_proj.weight": torch.zeros(16, 64)}
    ),
    "nothing but a pickle": lambda path: [
        *(file.unlink() for file in path.glob("model*")),
        (path / "pytorch_model.bin").write_bytes(CONTENTS["pickle"]),
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


def _large(name: str, before: bytes, piece: bytes, after: bytes, size: int = 200_000_000) -> Attack:
    return lambda checkpoint: repeated(checkpoint / name, size, before, piece, after)


GIGANTIC_CHECKPOINTS: dict[str, Attack] = {
    "config: 10**9 blocks": _config_value(num_hidden_layers=10**9),
    "config: 10**18 blocks": _config_value(num_hidden_layers=10**18),
    "config: width 2**40": _config_value(hidden_size=2**40, num_attention_heads=2**20, head_dim=2**20),
    "config: 10**15 tokens": _config_value(vocab_size=10**15),
    "config: 10**12 heads": _config_value(num_attention_heads=10**12),
    "config: 200 MB": _large("config.json", b'{"a":"', b"a", b'"}'),
    "config: 200 MB of lists": _large("config.json", b'{"a":[', b"[],", b"1]}"),
    "config: 30 MB of lists": _large("config.json", b'{"a":[', b"[],", b"1]}", 30_000_000),
    "index: 60 MB of lists": _large(
        "model.safetensors.index.json", b'{"weight_map":{"a":[', b"[],", b"1]}}", 60_000_000
    ),
    "index: 200 MB of lists": _large("model.safetensors.index.json", b'{"weight_map":{"a":[', b"[],", b"1]}}"),
    "index: 200 MB": _large("model.safetensors.index.json", b'{"weight_map":{"a":"', b"a", b'"}}'),
    "a shard's header of 64 GiB": lambda path: sparse(64 * 1024 * MIB)(shards(path)[0]),
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
    "config: pipe": lambda path: pipe(path / "adapter_config.json"),
    "manifest: pipe": lambda path: pipe(path / "fedproxy.json"),
    "config: 200 MB of lists": _large("adapter_config.json", b'{"a":[', b"[],", b"1]}"),
    "config: 30 MB of lists": _large("adapter_config.json", b'{"a":[', b"[],", b"1]}", 30_000_000),
    "manifest: 200 MB of lists": _large("fedproxy.json", b'{"a":[', b"[],", b"1]}"),
    "manifest: 30 MB of lists": _large("fedproxy.json", b'{"a":[', b"[],", b"1]}", 30_000_000),
}
"""Attacks on an adapter's directory whose harm is the memory or the time that believing them would take."""
