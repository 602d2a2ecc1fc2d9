"""The synthetic checkpoints: exactly the published shapes, loadable, the same tensors whatever the shards."""

import importlib.util
import json
import math
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedproxy.errors import ResourceError, UsageError
from fedproxy.tensor_files import load_tensors

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_synthetic_llm.py"
PUBLISHED = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_synthetic_llm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parameter_counts_are_the_published_ones(script):
    assert PUBLISHED.keys() == script.CONFIGS.keys() - {"tiny"}
    for name, count in PUBLISHED.items():
        shapes = script.tensor_shapes(script.skeleton({**script.CONFIGS[name], "num_hidden_layers": 1}))
        block = sum(math.prod(shape) for key, shape in shapes.items() if ".layers.0." in key)
        rest = sum(math.prod(shape) for shape in shapes.values()) - block
        assert rest + block * script.CONFIGS[name]["num_hidden_layers"] == count, name


def test_it_loads_with_every_weight_from_its_files(script, tmp_path):
    out = script.make_synthetic_llm(tmp_path / "llm", "tiny", shard_size=100_000, blocks=3)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    assert [file.name for file in shards] == [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    assert model.config.num_hidden_layers == 3
    state = model.state_dict()
    stored = {name: tensor for file in shards for name, tensor in load_tensors(file).items()}
    assert stored.keys() == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert {name: index["weight_map"][name] for name in load_tensors(shards[1])} == dict.fromkeys(
        load_tensors(shards[1]), shards[1].name
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("Bytes: äß")["input_ids"]) == "Bytes: äß"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 258


def test_weights_are_normal_and_norms_one(script, tmp_path):
    tensors = load_tensors(script.make_synthetic_llm(tmp_path / "llm", "tiny", dtype="fp32") / "model.safetensors")
    for name, tensor in tensors.items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.05)
            assert abs(tensor.mean().item()) < 5 * 0.02 / math.sqrt(tensor.numel())
    assert not torch.equal(*[tensors[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1)])


def test_the_seed_decides_whatever_the_shards(script, tmp_path):
    def tensors(out, **options):
        files = sorted(script.make_synthetic_llm(tmp_path / out, "tiny", **options).glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_tensors(file).items()}

    first, sharded, other = tensors("a"), tensors("b", shard_size=100_000), tensors("c", seed=1)
    assert all(torch.equal(first[name], sharded[name]) for name in first | sharded)
    assert not any(torch.equal(first[name], other[name]) for name in first if "norm" not in name)


def test_a_tensor_larger_than_the_pool_is_put_together_from_it(script):
    pool = torch.arange(script.STRETCH + 10)
    pieces = list(script.values("w", (3, script.STRETCH), pool, seed=0))
    assert [len(piece) for piece in pieces] == [script.STRETCH] * 3
    assert len({int(piece[0]) for piece in pieces}) > 1


def test_tied_weights_are_written_once(script):
    config = {**script.CONFIGS["tiny"], "tie_word_embeddings": True}
    names = script.tensor_shapes(script.skeleton(config))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_shards_hold_at_most_the_limit_or_one_tensor(script):
    shapes = {"a": (4,), "b": (4,), "c": (100,), "d": (1,)}
    assert [list(shard) for shard in script.split(shapes, 2, 16)] == [["a", "b"], ["c"], ["d"]]


def test_a_disk_without_room_is_refused_before_anything_is_written(script, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 0, 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match=r"13\.5 GB"):
        script.make_synthetic_llm(tmp_path / "deep" / "llm", "llama-2-7b")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_one_leaves_nothing(script, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "values", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.make_synthetic_llm(tmp_path / "llm", "tiny")
    assert not list(tmp_path.iterdir())


def test_wrong_usage(script, tmp_path):
    with pytest.raises(UsageError, match="blocks"):
        script.make_synthetic_llm(tmp_path / "llm", "tiny", blocks=0)
    assert [script.byte_count(text) for text in ("5GB", "1.5 MiB", "300")] == [5 * 10**9, 3 * 2**19, 300]
    for text in ("5 parsecs", "GB", "-1GB", "0"):
        with pytest.raises(script.argparse.ArgumentTypeError):
            script.byte_count(text)


@pytest.mark.long
def test_the_command(tmp_path):
    command = [sys.executable, SCRIPT, tmp_path / "llm", "--like", "tiny", "--dtype", "fp16", "--shard-size", "500kB"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"path": str(tmp_path / "llm")}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "llm").dtype == torch.float16
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "--overwrite" in again.stderr
    assert "Traceback" not in again.stderr
