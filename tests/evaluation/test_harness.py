import copy
import importlib
import json
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fedproxy.errors import ArtifactError, MissingExtraError, UsageError
from fedproxy.evaluation import evaluate, training_rows
from fedproxy.fusion import fuse
from fedproxy.models import lora
from fedproxy.models.families import keep_blocks


def likelihood(model: Any, tokenizer: Any, prompt: str, completion: str) -> float:
    """The log probability of a completion after a prompt, one pair at a time."""
    moved = prompt[len(prompt.rstrip()) :] + completion
    start = len(tokenizer(prompt.rstrip())["input_ids"])
    ids = torch.tensor([tokenizer(prompt.rstrip() + moved)["input_ids"]])
    with torch.no_grad():
        logs = model(ids).logits[0, :-1].log_softmax(-1)
    return float(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum())


def by_hand(model: Any, tokenizer: Any, data: Path) -> dict[str, dict[str, float]]:
    def rows(name: str, split: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / name / f"{split}.jsonl").read_text().splitlines()]

    def best(prompt: str, options: list[str], lengths: list[int]) -> int:
        scores = [likelihood(model, tokenizer, prompt, f" {option}") for option in options]
        return int(np.argmax(np.array(scores) / lengths))

    def accuracy(questions: list[tuple[str, list[str], int]], *, normed: bool = False) -> float:
        return float(np.mean([best(p, o, [len(x) if normed else 1 for x in o]) == gold for p, o, gold in questions]))

    sst2 = [
        (
            f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            ["negative", "positive"],
            row["label"],
        )
        for row in rows("sst2", "validation")
    ]
    arc = [
        (f"Question: {r['question']}\nAnswer:", r["choices"]["text"], r["choices"]["label"].index(r["answerKey"]))
        for r in rows("arc_easy", "test")
    ]
    openbook = [
        (row["question_stem"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))
        for row in rows("openbookqa", "test")
    ]
    colours = [
        (f"Name the colour.\nthe {c} river is", ["red", "green", "blue"], i)
        for i, c in enumerate(["red", "green", "blue"])
    ]
    return {
        "sst2": {"acc": accuracy(sst2), "n": 7},
        "arc_easy": {"acc": accuracy(arc), "acc_norm": accuracy(arc, normed=True), "n": 6},
        "openbookqa": {"acc": accuracy(openbook), "acc_norm": accuracy(openbook, normed=True), "n": 6},
        "colours": {"acc": accuracy(colours), "n": 3},
    }


@pytest.mark.parametrize("adds_bos", [True, False])
def test_accuracy_is_that_of_option_likelihoods_computed_by_hand(
    adds_bos: bool,
    data: Path,
    include: Path,
    model: LlamaForCausalLM,
    make_tokenizer: Callable[[bool], PreTrainedTokenizerFast],
) -> None:
    tokenizer = make_tokenizer(adds_bos)
    expected = by_hand(model, tokenizer, data)
    found = evaluate(model, tokenizer=tokenizer, tasks=list(expected), data=data, include=include, batch_size=5)
    assert found["tasks"] == expected
    assert found["average"] == pytest.approx(np.mean([metrics["acc"] for metrics in expected.values()]))
    told: dict[str, list[float]] = {}
    options: dict[str, Any] = {"tasks": [*expected, "spelling"], "data": data, "include": include, "batch_size": 5}
    again = evaluate(model, tokenizer=tokenizer, **options, on_documents=told.__setitem__)
    assert {name: metrics for name, metrics in again["tasks"].items() if name != "spelling"} == expected
    assert {name: len(documents) for name, documents in told.items()} == {
        name: metrics["n"] for name, metrics in again["tasks"].items()
    }
    for name, metrics in expected.items():
        assert set(told[name]) <= {0.0, 1.0}
        assert np.mean(told[name]) == pytest.approx(metrics["acc"])


def test_a_peft_model_is_scored_with_its_adapter_and_everything_is_left_as_found(
    data: Path,
    include: Path,
    model: LlamaForCausalLM,
    make_tokenizer: Callable[[bool], PreTrainedTokenizerFast],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = make_tokenizer(False)
    tokenizer.pad_token = None
    wrapped = get_peft_model(LlamaForCausalLM(model.config), LoraConfig(r=4, target_modules="all-linear"))
    wrapped.load_state_dict({f"base_model.model.{n}": v for n, v in model.state_dict().items()}, strict=False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.3 if "lora" in name else 0.2)
    wrapped.train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    level = logging.getLogger("lm_eval").level
    seen: list[tuple[float, str]] = []
    found = evaluate(
        wrapped,
        tokenizer=tokenizer,
        tasks=["colours", "spelling"],
        data=data,
        include=include,
        limit=2,
        on_progress=lambda fraction, text: seen.append((fraction, text)),
    )
    assert wrapped.training
    assert tokenizer.pad_token is None
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert logging.getLogger("lm_eval").level == level
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert {name: metrics["n"] for name, metrics in found["tasks"].items()} == {"colours": 2, "spelling": 2}
    assert found["tasks"]["spelling"].keys() == {"exact_match", "n"}
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] == 1
    assert {text for _, text in seen} >= {"colours", "spelling"}
    wrapped.eval()
    prompts = [row["prompt"] for row in training_rows("colours", split="test", include=include)][:2]
    options = ["red", "green", "blue"]
    hits = [
        int(np.argmax([likelihood(wrapped, tokenizer, prompt, f" {option}") for option in options])) == index
        for index, prompt in enumerate(prompts)
    ]
    assert found["tasks"]["colours"]["acc"] == np.mean(hits)


def test_a_checkpoint_is_loaded_with_its_tokenizer(
    data: Path, tmp_path: Path, model: LlamaForCausalLM, make_tokenizer: Callable[[bool], PreTrainedTokenizerFast]
) -> None:
    tokenizer = make_tokenizer(True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = evaluate(model, tokenizer=tokenizer, tasks=["sst2"], data=data)
    assert evaluate(tmp_path, tasks=["sst2"], data=data) == loaded
    with pytest.raises(ArtifactError):
        evaluate(tmp_path / "none", tasks=["sst2"], data=data)


def test_a_fused_model_in_memory_scores_as_its_checkpoint(
    data: Path, tmp_path: Path, model: LlamaForCausalLM, make_tokenizer: Callable[[bool], PreTrainedTokenizerFast]
) -> None:
    tokenizer = make_tokenizer(True)
    model.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    tuned = lora.attach(keep_blocks(model, [1]), r=4, alpha=8, dropout=0.0, seed=0)
    state = {name: torch.full_like(tensor, 0.2) for name, tensor in lora.adapter_state(tuned).items()}
    lora.set_adapter_state(tuned, state)
    wrapped = fuse(copy.deepcopy(model), tuned, layer_map=[1])
    fused = fuse(tmp_path / "llm", tuned, tmp_path / "fused", layer_map=[1], form="checkpoint")
    options: dict[str, Any] = {"tasks": ["sst2", "arc_easy", "openbookqa"], "data": data}
    found = evaluate(wrapped, tokenizer=tokenizer, **options)
    assert found == evaluate(fused, **options)
    assert found != evaluate(model, tokenizer=tokenizer, **options)
    with pytest.raises(UsageError, match="dict"):
        evaluate({"w": "no model"}, tokenizer=tokenizer, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": []}, "at least one task"),
        ({"tasks": "sst2"}, "give a list"),
        ({"tasks": ["sst2"], "limit": 0}, "limit is 0"),
        ({"tasks": ["sst2"], "batch_size": 0}, "batch_size is 0"),
        ({"tasks": ["sst2"]}, "needs tokenizer="),
    ],
)
def test_impossible_wishes_are_usage_errors(
    options: dict[str, Any], said: str, data: Path, model: LlamaForCausalLM
) -> None:
    with pytest.raises(UsageError, match=said):
        evaluate(model, data=data, **options)


@pytest.mark.parametrize("missing", ["lm_eval", "datasets"])
def test_without_the_harness_the_extra_is_named(missing: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("lm_eval.evaluator")
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    from fedproxy.evaluation import tasks

    tasks._stock_paths.cache_clear()
    with pytest.raises(MissingExtraError, match=r"fedproxy\[eval\]"):
        training_rows("sst2", data=data)


def test_what_is_better_lower_is_scored_but_in_no_average_and_no_comparison(
    model: LlamaForCausalLM, make_tokenizer: Callable[[bool], PreTrainedTokenizerFast], lower_is_better: Path
) -> None:
    documents: dict[str, list[float]] = {}
    tasks = ["mistakes", "hits", "text"]
    options: Any = {"include": lower_is_better, "trust_tasks": True, "tokenizer": make_tokenizer(True)}
    found = evaluate(model, tasks=tasks, on_documents=documents.__setitem__, **options)
    scores = found["tasks"]
    assert scores["mistakes"]["mistakes"] == pytest.approx(1 - scores["hits"]["acc"])
    assert scores["text"]["word_perplexity"] > 1
    assert found["average"] == scores["hits"]["acc"]
    assert list(documents) == ["hits"]
    assert list(found["left_out"]) == ["mistakes", "text"]
    assert "word_perplexity" in found["left_out"]["text"]
    alone = evaluate(model, tasks=["text"], **options)
    assert alone["average"] is None
    assert "left_out" not in evaluate(model, tasks=["hits"], **options)
