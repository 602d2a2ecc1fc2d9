import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from fedproxy.evaluation.scorer import Scorer

FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3", "gpt2", "opt",
    "gpt_neox",
    "bloom",
]  # fmt: skip


def requests(seed: int = 0) -> list[tuple[None, list[int], list[int]]]:
    """Contexts of 1 to 40 tokens, each with one to five options of one to six tokens; some options occur twice."""
    generator = random.Random(seed)
    found = []
    for _ in range(12):
        context = generator.choices(range(250), k=generator.choice([1, 2, 9, 10, 11, 13, 30, 40]))
        options = [
            generator.choices(range(250), k=generator.choice([1, 1, 2, 6])) for _ in range(generator.randint(1, 4))
        ]
        found += [(None, context, option) for option in [*options, options[0]]]
    generator.shuffle(found)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_contexts_give_the_harness_its_own_answers(
    family: str, tiny_model: Callable[..., Any], make_tokenizer: Callable[[bool], PreTrainedTokenizerFast]
) -> None:
    scorer = Scorer(tiny_model(family), make_tokenizer(False), batch_size=7)
    expected = HFLM._loglikelihood_tokens(scorer, requests(), disable_tqdm=True)
    found = scorer._loglikelihood_tokens(requests())
    assert torch.tensor([x for x, _ in found]) == pytest.approx(torch.tensor([x for x, _ in expected]), abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_context_is_read_once_for_all_its_options(
    tiny_model: Callable[..., Any], make_tokenizer: Callable[[bool], PreTrainedTokenizerFast]
) -> None:
    model = tiny_model()
    scorer = Scorer(model, make_tokenizer(False), batch_size=64)
    shapes = []
    model.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    scorer._loglikelihood_tokens([(None, list(range(30)), [50 + i, 60]) for i in range(8)])
    assert shapes == [(1, 1), (1, 29), (8, 2)]


def test_requests_that_are_too_long_go_the_harness_way(
    tiny_model: Callable[..., Any], make_tokenizer: Callable[[bool], PreTrainedTokenizerFast]
) -> None:
    scorer = Scorer(tiny_model(max_position_embeddings=16), make_tokenizer(False), batch_size=4)
    long = [(None, list(range(20)), [option]) for option in (30, 31)]
    assert scorer._loglikelihood_tokens(long) == HFLM._loglikelihood_tokens(scorer, long, disable_tqdm=True)


def test_options_do_not_tie_by_rounding(
    tiny_model: Callable[..., Any], make_tokenizer: Callable[[bool], PreTrainedTokenizerFast]
) -> None:
    scorer = Scorer(tiny_model(dtype=torch.bfloat16), make_tokenizer(False), batch_size=4)
    found = scorer._loglikelihood_tokens([(None, [1, 2, 3], [option, 5]) for option in range(20)])
    assert len({torch.tensor(value).bfloat16().item() for value, _ in found}) < len({value for value, _ in found})


def test_encoding_is_the_tokenizers_own(
    tiny_model: Callable[..., Any], make_tokenizer: Callable[[bool], PreTrainedTokenizerFast]
) -> None:
    for adds_bos in (True, False):
        tokenizer = make_tokenizer(adds_bos)
        scorer = Scorer(tiny_model(), tokenizer, batch_size=4)
        assert scorer.tok_encode("red stone") == tokenizer("red stone")["input_ids"]
        assert scorer.tok_encode("<s>red stone") == tokenizer("<s>red stone", add_special_tokens=False)["input_ids"]
        assert (
            scorer.tok_encode("red", add_special_tokens=False)
            == tokenizer("red", add_special_tokens=False)["input_ids"]
        )
