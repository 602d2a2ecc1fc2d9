"""The pre-training script on a tiny mixture: it ends in a checkpoint with card, and a killed one goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_demo_llm.py"
MIXTURE = """
licence = "cc0-1.0"
notes = "A test."
[model]
vocab_size = 300
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
max_position_embeddings = 64
[train]
tokens = 40_000
window = 16
batch = 4
micro_batch = 2
learning_rate = 3e-3
weight_decay = 0.0
warmup_steps = 2
decay = 0.5
layer_drop = 0.5
seed = 0
save_every_seconds = 0
[[source]]
name = "text"
share = 0.7
files = ["text.txt"]
separator = "\\n\\n"
licence = "CC0"
origin = "made up"
[[source]]
name = "rows"
share = 0.3
files = ["rows.jsonl"]
template = "{text}: {label_words}"
exclude = ["test.jsonl"]
exclude_field = "text"
skip_labels = ["secret"]
licence = "CC0"
origin = "made up"
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU"),
]


def test_it_trains_goes_on_after_a_kill_and_writes_a_card(tmp_path):
    (tmp_path / "mixture.toml").write_text(MIXTURE)
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"The quick brown fox jumps over dog number {i}." for i in range(99))
    )
    rows = [{"text": f"word {i}", "label_text": "secret" if i % 2 else "a_label"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "word 2"}))
    out = tmp_path / "llm"
    command = [sys.executable, SCRIPT, tmp_path / "mixture.toml", "--data", tmp_path, "--out", out, "--device", "cpu"]
    plainly = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # compiling takes a minute of processor time
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=plainly)
    deadline = time.monotonic() + 240
    while not (out / "state.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (out / "state.safetensors").exists()
    assert not (out / "model.safetensors").exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=400, env=plainly)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] >= 40_000
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(out)("fox")["input_ids"][0] == model.config.bos_token_id
    card = (out / "README.md").read_text()
    assert "CC0" in card
    assert "nats a token" in card
    assert not (out / "state.safetensors").exists()
