import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedproxy.adapter_files import write_adapter
from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import model_identity
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.evaluation import evaluate, harness_model
from fedproxy.evaluation.loading import load_for_evaluation
from fedproxy.models import lora, precision
from fedproxy.models.checkpoints import load_model, save_checkpoint
from fedproxy.models.families import keep_blocks
from fedproxy.models.proxy_tuned_model import ProxyTunedModel

TASKS = ["sst2", "arc_easy", "colours", "spelling"]
KEPT = [1]


class Reference(LlamaForCausalLM):
    """Three forwards of three models in memory, and no cache."""

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **_: Any) -> Any:
        base, up, down = (
            LlamaForCausalLM.forward(m, input_ids, attention_mask, position_ids, use_cache=False).logits
            for m in (self, self.others.tuned, self.others.untuned)
        )
        return CausalLMOutputWithPast(logits=base + self.others.alpha * (up - down))

    def generate(self, *prompts: Any, **options: Any) -> Any:
        return super().generate(*prompts, **{**options, "use_cache": False})


@pytest.fixture
def proxy(model: LlamaForCausalLM) -> PeftModel:
    tuned = lora.attach(keep_blocks(model, KEPT), r=4, alpha=8, dropout=0.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    state = {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in lora.adapter_state(tuned).items()}
    lora.set_adapter_state(tuned, state)
    return tuned.eval()


@pytest.fixture
def reference(model: LlamaForCausalLM, proxy: PeftModel) -> Callable[[float], Reference]:
    def make(alpha: float) -> Reference:
        llm = copy.deepcopy(model)
        llm.__class__ = Reference
        untuned = keep_blocks(model, KEPT)
        llm.others = SimpleNamespace(tuned=copy.deepcopy(proxy).merge_and_unload(), untuned=untuned, alpha=alpha)
        return llm

    return make


@pytest.fixture
def artifacts(
    model: LlamaForCausalLM,
    proxy: PeftModel,
    make_tokenizer: Callable[[bool], PreTrainedTokenizerFast],
    tmp_path: Path,
) -> Path:
    """A folder with llm, proxy and adapter."""
    model.save_pretrained(tmp_path / "llm")
    make_tokenizer(True).save_pretrained(tmp_path / "llm")
    sha256 = model_identity(tmp_path / "llm")
    for name in ("proxy", "adapter"):
        (tmp_path / name).mkdir()
    save_checkpoint(tmp_path / "proxy", keep_blocks(model, KEPT), tmp_path / "llm")
    Manifest("proxy", sha256, 2, KEPT).write(tmp_path / "proxy")
    manifest = Manifest("proxy-adapter", sha256, 2, KEPT)
    write_adapter(tmp_path / "adapter", lora.adapter_config(proxy), lora.adapter_state(proxy), manifest)
    return tmp_path


def answers(lm: Any, data: Path, include: Path) -> dict[str, list[Any]]:
    """All that the stock harness hears from a model, by task."""
    loaded = load_for_evaluation(TASKS, data=data, include=include)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=list(loaded.values()), task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    return {task: [sample["filtered_resps"] for sample in results["samples"][task]] for task in TASKS}


def test_the_stock_harness_hears_what_three_forwards_say(
    artifacts: Path,
    reference: Callable[[float], Reference],
    data: Path,
    include: Path,
    make_tokenizer: Callable[[bool], PreTrainedTokenizerFast],
) -> None:
    stock = HFLM(pretrained=reference(0.5), tokenizer=make_tokenizer(True), batch_size=3, softmax_dtype="float32")
    expected = answers(stock, data, include)
    lm = harness_model(
        artifacts / "llm", proxy=artifacts / "proxy", adapter=artifacts / "adapter", alpha=0.5, batch_size=5
    )
    found = answers(lm, data, include)
    assert found["spelling"] == expected["spelling"]
    assert len({answer for row in found["spelling"] for answer in row}) > 1
    for task in TASKS[:3]:
        for left, right in zip(found[task], expected[task], strict=True):
            assert [x for x, _ in left] == pytest.approx([x for x, _ in right], abs=1e-3)
            assert [greedy for _, greedy in left] == [greedy for _, greedy in right]
    untuned = answers(harness_model(artifacts / "llm"), data, include)
    assert untuned["spelling"] != found["spelling"]


def test_evaluate_scores_the_combined_model(
    artifacts: Path, reference: Callable[[float], Reference], model: Any, proxy: PeftModel, data: Path, include: Path
) -> None:
    tokenizer = harness_model(artifacts / "llm").tokenizer
    options = {"tasks": TASKS, "data": data, "include": include}
    expected = evaluate(reference(1.0), tokenizer=tokenizer, **options)
    paths = {"proxy": artifacts / "proxy", "adapter": artifacts / "adapter"}
    assert evaluate(artifacts / "llm", **paths, **options) == expected
    assert evaluate(ProxyTunedModel(model, proxy), tokenizer=tokenizer, **options) == expected
    assert evaluate(artifacts / "llm", alpha=0.0, **paths, **options) == evaluate(artifacts / "llm", **options)


def test_a_context_is_read_once_for_all_its_options(
    model: LlamaForCausalLM, proxy: PeftModel, make_tokenizer: Callable[[bool], PreTrainedTokenizerFast]
) -> None:
    lm = harness_model(ProxyTunedModel(model, proxy), tokenizer=make_tokenizer(False))
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    lm._loglikelihood_tokens([(None, list(range(30)), [50 + i, 60]) for i in range(8)])
    hook.remove()
    assert shapes == [(1, 1), (1, 29), (8, 2)]


def test_wishes_that_do_not_go_together_are_usage_errors(
    artifacts: Path,
    model: LlamaForCausalLM,
    data: Path,
    make_tokenizer: Callable[[bool], PreTrainedTokenizerFast],
) -> None:
    llm, proxy, adapter = (artifacts / name for name in ("llm", "proxy", "adapter"))
    for options, said in (
        ({"alpha": 1.0}, "give the proxy"),
        ({"alpha": 1.0, "adapter": adapter}, "give the proxy"),
        ({"proxy": proxy}, "give the adapter"),
        ({"proxy": proxy, "adapter": adapter, "alpha": float("nan")}, "finite"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(UsageError, match=said):
            evaluate(llm, tasks=["sst2"], data=data, **options)
        with pytest.raises(UsageError, match=said):
            harness_model(llm, **options)
    with pytest.raises(UsageError, match="LlamaForCausalLM"):
        harness_model(model, tokenizer=make_tokenizer(True), proxy=proxy, adapter=adapter)
    with pytest.raises(ArtifactError, match="proxy of another LLM"):
        evaluate(proxy, proxy=proxy, adapter=adapter, tasks=["sst2"], data=data)


def test_the_command(artifacts: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedproxy.cli import main

    llm, proxy, adapter = (str(artifacts / name) for name in ("llm", "proxy", "adapter"))

    def call(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["evaluate", *arguments, "--tasks", "sst2", "--data", str(data), "--json"])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    code, out, _ = call(llm, "--proxy", proxy, "--adapter", adapter, "--alpha", "0.5")
    expected = evaluate(llm, proxy=proxy, adapter=adapter, alpha=0.5, tasks=["sst2"], data=data)
    assert (code, json.loads(out)) == (0, expected)
    assert call(llm, "--alpha", "0.5")[0] == 2
    assert call(llm, "--proxy", proxy)[0] == 2
    code, _, said = call(proxy, "--proxy", proxy, "--adapter", adapter)
    assert code == 3
    assert "proxy of another LLM" in " ".join(said.split())
    assert call(llm, "--proxy", llm, "--adapter", adapter)[0] == 3


@pytest.mark.parametrize("fast", [False, True])
def test_a_checkpoint_in_bfloat16_is_multiplied_so_where_that_is_fast(
    fast: bool,
    model: LlamaForCausalLM,
    make_tokenizer: Callable[[bool], PreTrainedTokenizerFast],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "bf16_is_fast", lambda device: fast)
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path)
    make_tokenizer(True).save_pretrained(tmp_path)
    wide = harness_model(load_model(tmp_path, dtype=torch.float32), tokenizer=make_tokenizer(True))
    requests = [(None, list(range(20)), [option, 3]) for option in range(30, 60)]
    found = torch.tensor([value for value, _ in harness_model(tmp_path)._loglikelihood_tokens(requests)])
    expected = torch.tensor([value for value, _ in wide._loglikelihood_tokens(requests)])
    assert torch.equal(found, expected) is not fast
    assert found == pytest.approx(expected, abs=0.1)
