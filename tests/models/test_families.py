import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from fedproxy.errors import ArtifactError
from fedproxy.models.block_stream import BlockStream
from fedproxy.models.families import FAMILIES as TESTED
from fedproxy.models.families import blocks, blocks_path, keep_blocks
from tests.conftest import BLOCKS, FAMILIES, make_model
from tests.in_memory import skipping

KEEP = [0, 3, 4]
PATHS = {
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    "bloom": "transformer.h",
}


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def logits_without(model: Any, removed: set[int]) -> torch.Tensor:
    """The oracle: removed blocks have their forward replaced by one that returns its input."""
    layers = model.get_submodule(PATHS.get(model.config.model_type, "model.layers"))
    in_tuple = model.config.model_type == "bloom"
    for number in removed:
        layers[number].forward = lambda states, *args, **kwargs: (states, None) if in_tuple else states
    return logits(model)


def test_every_family_of_the_list_is_tested() -> None:
    assert set(FAMILIES) == set(TESTED)


@pytest.mark.parametrize("family", TESTED)
def test_a_pruned_model_is_the_model_with_blocks_skipped(family: str, tmp_path: Path) -> None:
    expected = logits_without(make_model(family), set(range(BLOCKS)) - set(KEEP))
    model = make_model(family)
    assert blocks_path(model) == PATHS.get(family, "model.layers")
    whole = logits(model)
    with skipping(model, [1, 2, 5]):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), whole)

    pruned = keep_blocks(model, KEEP)
    assert torch.equal(logits(pruned), expected)
    assert not torch.allclose(whole, expected, atol=1e-2)

    pruned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config.get("num_hidden_layers") or config["n_layer"]) == len(KEEP)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(plain), expected)

    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    uncached = plain.generate(tokens(), attention_mask=torch.ones(2, 20), use_cache=False, **settings)
    for candidate in (plain, pruned):
        cached = candidate.generate(tokens(), attention_mask=torch.ones(2, 20), use_cache=True, **settings)
        assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family", TESTED)
def test_a_block_that_is_kept_twice_runs_twice_with_weights_and_keys_of_its_own(family: str) -> None:
    model, order = make_model(family), [0, 0, 2, 4, 4, 4]
    stream = BlockStream(model)
    passage = stream.enter(tokens(), torch.ones_like(tokens()))
    for number in order:
        passage.hidden = stream.run(number, passage)
    repeated = keep_blocks(model, order)
    again = BlockStream(repeated)
    entered = again.enter(tokens(), torch.ones_like(tokens()))
    for number in range(len(order)):
        entered.hidden = again.run(number, entered)
    assert torch.equal(entered.hidden, passage.hidden)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, plain = (
        repeated.generate(tokens(), attention_mask=torch.ones(2, 20), use_cache=use, **settings)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)
    first, second = blocks(repeated)[:2]
    assert {weight.data_ptr() for weight in first.parameters()}.isdisjoint(
        weight.data_ptr() for weight in second.parameters()
    )


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("smollm3", "no_rope_layers", [1, 1, 0]),
        ("gemma3_text", "layer_types", ["sliding_attention", "sliding_attention", "sliding_attention"]),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention", "sliding_attention"]),
    ],
)
def test_config_lists_with_an_entry_per_block_are_sliced(family: str, name: str, expected: list[object]) -> None:
    assert getattr(keep_blocks(make_model(family), KEEP).config, name) == expected


def test_a_list_that_only_happens_to_be_as_long_stays() -> None:
    model = make_model("llama", num_hidden_layers=2)
    model.config.eos_token_id = [257, 258]
    assert keep_blocks(model, [1]).config.eos_token_id == [257, 258]


def encoder_decoder() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, decoder_start_token_id=0)
    )


def state_space() -> Any:
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    )


def no_blocks() -> Any:
    model = make_model()
    model.model.layers = torch.nn.ModuleList()
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [(encoder_decoder, "encoder-decoder"), (state_space, "state-space"), (no_blocks, "no lists of its 6 blocks")],
)
def test_other_models_are_refused(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        blocks_path(make())
