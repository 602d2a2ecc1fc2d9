"""The demo as a newcomer runs it: one command, real input; the tuned LLM must be far better on every task."""

import json
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedproxy.checkpoint_files import weight_files
from fedproxy.demo import EXPERIMENT
from fedproxy.pipeline import read_experiment

LLM = EXPERIMENT.parent / "llm"


def test_the_bundled_llm_is_small_and_documented():
    assert sum(path.stat().st_size for path in weight_files(LLM)) <= 16e6
    card = (LLM / "README.md").read_text()
    for word in ("licence", "tokens", "loss", "CC BY-SA"):
        assert word in card


def test_the_experiment_is_the_papers_method_on_four_different_tasks():
    experiment = read_experiment(EXPERIMENT)
    assert (experiment.compress.remove, experiment.compress.score) == (0.5, "block-influence")
    assert (experiment.federate.merge, experiment.federate.regulariser) == ("h-ties", "pcr")
    assert len({client.task for client in experiment.client}) == 4


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_tuned_llm_is_far_better_on_every_task(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "fedproxy", "demo", "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    llm, fused = (results["evaluation"][name]["tasks"] for name in ("llm", "fused"))
    gains = {task: fused[task]["acc"] - llm[task]["acc"] for task in llm}
    assert len(gains) == 4
    assert min(gains.values()) > 0.15, gains
    assert results["gap_closed"] > 0.6
    assert (out / "report.html").stat().st_size > 10_000
    scores = {
        each.dataset_name: each.metric_value for each in ModelCard.load(out / "fused" / "README.md").data.eval_results
    }
    assert scores == {task: pytest.approx(fused[task]["acc"], abs=1e-6) for task in fused}
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(LLM), out / "fused")
    tokens = AutoTokenizer.from_pretrained(LLM)("Command: play some jazz\nAction:", return_tensors="pt")
    assert tuned.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1] > tokens["input_ids"].shape[1]
