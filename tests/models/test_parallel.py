"""Several processes on one CPU, as a launcher begins them on several GPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedproxy.models.encoding import Encoded
from fedproxy.models.parallel import shares, team
from fedproxy.tensor_files import load_tensors

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from fedproxy.cli import _join_team
from fedproxy.config import Train
from fedproxy.errors import FedproxyError
from fedproxy.models.encoding import Encoded
from fedproxy.models.lora import adapter_parameters, adapter_state
from fedproxy.models.parallel import team
from fedproxy.models.trainable import load_trainable
from fedproxy.models.training import train
from fedproxy.tensor_files import save_tensors

llm, out, case = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if os.environ.get("WORLD_SIZE"):
    _join_team()
settings = Train(batch_size=5, learning_rate=1e-2, lora_r=2, lora_alpha=4, lora_dropout=0.0, precision="fp32", epochs=2,
                 gradient_accumulation_steps=2)
generator = torch.Generator().manual_seed(0)
examples = [Encoded(torch.randint(256, (n,), generator=generator).tolist(), 1 + n // 3) for n in range(2, 27)]
model = load_trainable(llm, settings, seed=0)
assert team() is None or (team().size == 2 and team().has(model))
for name, parameter in adapter_parameters(model).items():
    parameter.requires_grad_(case != "frozen" or ".lora_B." in name)


def on_step(step, total, loss):
    if case == "stopped":
        print("STEP", flush=True)
        import time
        time.sleep(60)
    if case == "failed":
        raise SystemExit(7)


def penalty(parameters):
    return sum(p.square().sum() for p in parameters.values()) * 0.1

done = train(model, examples, settings, pad=256, seed=3, penalty=penalty, on_step=on_step)
if case == "nan":
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(torch.nan)
    try:
        train(model, examples, settings, pad=256, seed=3)
    except FedproxyError:
        with torch.no_grad():
            model.get_base_model().model.norm.weight.fill_(1.0)
done = train(model, examples, settings, pad=256, seed=4)
save_tensors(out, {**adapter_state(model), "losses": torch.tensor(done.losses)})
"""
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def begin(launcher: list[str], *arguments: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def below(process: int) -> set[int]:
    """The processes that a process began, and those that they began."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return {int(child) for child in children} | {far for child in children for far in below(int(child))}


def gone(processes: set[int], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(Path(f"/proc/{process}").exists() for process in processes)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", *(pytest.param(case, marks=pytest.mark.long) for case in ("frozen", "nan"))])
def test_two_processes_train_what_one_does(case: str, script: Path, tmp_path: Path, tiny_checkpoint: Any) -> None:
    found = []
    for launcher in ([], LAUNCH):
        out = tmp_path / f"{len(launcher)}.safetensors"
        process = begin(launcher, script, tiny_checkpoint(num_hidden_layers=2), out, case)
        said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        found.append(load_tensors(out))
    alone, shared = found
    assert alone.keys() == shared.keys()
    assert all(torch.allclose(tensor, shared[name], atol=1e-4) for name, tensor in alone.items())


@pytest.mark.long
def test_an_error_ends_all_processes_and_the_launcher_says_its_code(
    script: Path, tmp_path: Path, tiny_checkpoint: Any
) -> None:
    process = begin(LAUNCH, script, tiny_checkpoint(num_hidden_layers=2), tmp_path / "out", "failed")
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "exitcode  : 7" in said


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_leader(number: int, script: Path, tmp_path: Path, tiny_checkpoint: Any) -> None:
    process = begin(LAUNCH, script, tiny_checkpoint(num_hidden_layers=2), tmp_path / "out", "stopped")
    assert process.stdout
    assert process.stdout.readline() == "STEP\n"
    workers = below(process.pid)
    assert len(workers) >= 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C does
    else:
        leader = next(w for w in workers if b"\0RANK=0\0" in b"\0" + Path(f"/proc/{w}/environ").read_bytes())
        os.kill(leader, number)
    assert gone(workers)
    process.communicate(timeout=60)
    assert process.returncode != 0


@pytest.mark.long
def test_the_command_line_under_a_launcher(tmp_path: Path) -> None:
    """One process speaks; a wrong file has the exit code that it always has."""
    process = begin(LAUNCH, "-m", "fedproxy", "federate", tmp_path / "missing.toml", "--out", tmp_path / "run")
    _, said = process.communicate(timeout=300)
    assert said.count("missing.toml: No such file") == 1
    assert "exitcode  : 3" in said


@pytest.mark.long
def test_a_federation_under_a_launcher_is_the_same(tmp_path: Path, tiny_checkpoint: Any, calibration: Path) -> None:
    rows = "\n".join(json.dumps({"prompt": f"say {'so ' * (i % 5)}:", "completion": f" {i}"}) for i in range(12))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "experiment.toml").write_text(
        f'[llm]\npath = "{tiny_checkpoint()}"\n[compress]\ncalibration = "{calibration}"\nmax_length = 32\n'
        '[[client]]\nname = "a"\ndata = "rows.jsonl"\n[[client]]\nname = "b"\ndata = "rows.jsonl"\n'
        '[train]\nbatch_size = 5\nlora_r = 2\nlora_dropout = 0.0\nmax_length = 32\nprecision = "fp32"\n'
        "[federate]\nrounds = 2\nregulariser_strength = 1.0\n"
    )
    found = []
    for launcher in ([], LAUNCH):
        out = tmp_path / f"run{len(launcher)}"
        process = begin(launcher, "-m", "fedproxy", "federate", tmp_path / "experiment.toml", "--out", out)
        said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        found.append(load_tensors(out / "adapter" / "adapter_model.safetensors"))
    assert all(torch.allclose(tensor, found[1][name], atol=1e-4) for name, tensor in found[0].items())


@given(st.lists(st.integers(2, 60), max_size=30), st.integers(1, 5))
def test_shares_hold_everything_once_and_are_balanced(lengths: list[int], count: int) -> None:
    examples = [Encoded([i] * n, 1) for i, n in enumerate(lengths)]
    given_out = shares(examples, count)
    assert sorted(example.ids[0] for share in given_out for example in share) == list(range(len(lengths)))
    tokens = [sum(len(example.ids) for example in share) for share in given_out]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


def test_a_process_alone_leads_nobody() -> None:
    assert team() is None
