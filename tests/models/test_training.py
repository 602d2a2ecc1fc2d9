import math

import pytest
import torch
from torch.nn import functional as F

from fedproxy.config import Train
from fedproxy.errors import ArtifactError, FedproxyError, UsageError
from fedproxy.models.lora import adapter_state, attach, set_adapter_state
from fedproxy.models.training import IGNORED, Encoded, batches, collate, encode, optimizer_steps, train
from tests.conftest import make_model, make_tokenizer

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id
ROWS = [{"prompt": f"say {word}:", "completion": f" {word}"} for word in ("yes", "no", "perhaps", "never", "always")]
SETTINGS = Train(epochs=2, batch_size=2, learning_rate=1e-2, lora_dropout=0.0, precision="fp32")


def ids(text):
    return TOKENIZER(text)["input_ids"]


def adapted(seed=0, dropout=0.0):
    return attach(make_model(num_hidden_layers=2), r=2, alpha=4, dropout=dropout, seed=seed)


def test_loss_counts_from_the_completion_and_the_text_ends():
    [example] = encode([{"prompt": "ab", "completion": " c"}], TOKENIZER, max_length=16)
    assert example == Encoded([*ids("ab c"), EOS], 2)


def test_trailing_spaces_of_the_prompt_belong_to_the_completion():
    assert encode([{"prompt": "ab ", "completion": "c"}], TOKENIZER, max_length=16) == encode(
        [{"prompt": "ab", "completion": " c"}], TOKENIZER, max_length=16
    )


def test_text_rows_and_whole_rows_learn_every_token_but_the_first():
    assert encode([{"text": "abc"}], TOKENIZER, max_length=16) == [Encoded([*ids("abc"), EOS], 1)]
    row = {"prompt": "a", "completion": "bc"}
    assert encode([row], TOKENIZER, max_length=16, completion_only=False) == [Encoded([*ids("abc"), EOS], 1)]


def test_long_prompts_lose_their_beginning_and_long_completions_their_end():
    [example] = encode([{"prompt": "abcdef", "completion": "gh"}], TOKENIZER, max_length=5)
    assert example == Encoded([*ids("efgh"), EOS], 2)
    [example] = encode([{"prompt": "ab", "completion": "cdefgh"}], TOKENIZER, max_length=4)
    assert example == Encoded(ids("cdef"), 1)


def test_messages_go_through_the_chat_template():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(UsageError, match="chat template"):
        encode([row], TOKENIZER, max_length=64)
    chat = make_tokenizer()
    chat.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    chat.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    [example] = encode([row], chat, max_length=64)
    assert example == Encoded(ids("[user]a;[assistant]b;"), len("[user]a;[assistant]"))


def test_nothing_to_learn_is_an_error():
    with pytest.raises(ArtifactError, match="No row has a token to learn"):
        encode([], TOKENIZER, max_length=8)


def test_collate_pads_and_masks():
    batch = collate([Encoded([5, 6, 7], 1), Encoded([8, 9], 1)], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]


@pytest.mark.parametrize("grouped", [True, False])
def test_batches_hold_every_example_once(grouped):
    examples = [Encoded([1] * n, 1) for n in range(2, 39)]
    cut = batches(examples, 4, group_by_length=grouped, generator=torch.Generator().manual_seed(0))
    assert sorted(i for batch in cut for i in batch) == list(range(37))
    assert max(len(batch) for batch in cut) == 4
    if grouped:
        assert max(abs(a - b) for batch in cut for a in batch for b in batch) <= 4


def test_step_counts():
    assert optimizer_steps(33, Train(batch_size=16)) == 3
    assert optimizer_steps(33, Train(batch_size=16, gradient_accumulation_steps=2, epochs=2)) == 4
    assert optimizer_steps(33, Train(batch_size=16, epochs=0.1)) == 1
    assert optimizer_steps(33, Train(batch_size=16, max_steps=2)) == 2


def bare_loop(model, examples, order, settings, penalty=None):
    """The oracle: full logits, cross-entropy by labels, torch's plain AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    for batch in order:
        padded = collate([examples[i] for i in batch], 256)
        logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), padded["labels"][:, 1:].flatten(), ignore_index=IGNORED)
        (loss + (penalty() if penalty else 0)).backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return adapter_state(model)


def test_it_trains_as_a_bare_loop_does():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    model = adapted()
    seen = []
    done = train(model, examples, SETTINGS, pad=256, seed=1, on_step=lambda *step: seen.append(step))
    assert len(done.losses) == len(seen) == 6
    assert done.tokens == 2 * sum(len(e.ids) for e in examples)
    from fedproxy.seeds import derive_seed

    generator = torch.Generator().manual_seed(derive_seed(1, "batches"))
    order = []
    for _ in range(2):
        order += reversed(batches(examples, 2, group_by_length=True, generator=generator))
    expected = bare_loop(adapted(), examples, order, SETTINGS)
    assert all(torch.allclose(value, expected[name], atol=1e-5) for name, value in adapter_state(model).items())


def test_accumulated_batches_weigh_every_token_alike():
    examples = encode(ROWS[:4], TOKENIZER, max_length=32)
    whole, parts = adapted(), adapted()
    train(whole, examples, Train(batch_size=4, learning_rate=1e-2, precision="fp32"), pad=256, seed=0)
    settings = Train(batch_size=1, gradient_accumulation_steps=4, learning_rate=1e-2, precision="fp32")
    train(parts, examples, settings, pad=256, seed=0)
    assert all(torch.allclose(v, adapter_state(parts)[n], atol=1e-6) for n, v in adapter_state(whole).items())


def test_checkpointing_changes_no_result():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    plain, checkpointed = adapted(), adapted()
    train(plain, examples, SETTINGS, pad=256, seed=0)
    train(checkpointed, examples, Train(**{**vars(SETTINGS), "gradient_checkpointing": True}), pad=256, seed=0)
    assert all(torch.allclose(v, adapter_state(checkpointed)[n], atol=1e-6) for n, v in adapter_state(plain).items())


def test_same_seed_same_bits_and_the_global_state_is_untouched():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    model = adapted(dropout=0.3)
    start = adapter_state(model)
    results = []
    for seed in (1, 1, 2):
        set_adapter_state(model, start)
        torch.manual_seed(seed * 77)
        before = torch.get_rng_state()
        train(model, examples, SETTINGS, pad=256, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(adapter_state(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in start)
    assert not all(torch.equal(results[0][name], results[2][name]) for name in start)


def test_the_base_is_frozen_and_the_loss_falls():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    model = adapted()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    done = train(model, examples, SETTINGS, pad=256, seed=0, steps=30)
    assert sum(done.losses[-3:]) < sum(done.losses[:3])
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_a_strong_penalty_holds_the_parameters_at_the_anchor():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    free, held = adapted(), adapted()
    anchor = adapter_state(held)

    def penalty(parameters):
        return 1e4 * sum(((p - anchor[name]) ** 2).sum() for name, p in parameters.items())

    settings = Train(**{**vars(SETTINGS), "max_grad_norm": 1e9})
    train(free, examples, settings, pad=256, seed=0, steps=20)
    train(held, examples, settings, pad=256, seed=0, steps=20, penalty=penalty)
    moved = [sum(float((v - anchor[n]).norm()) for n, v in adapter_state(m).items()) for m in (free, held)]
    assert moved[1] < moved[0] / 2


def test_a_diverging_loss_is_an_error_that_says_what_to_do():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    model = adapted()
    state = adapter_state(model)
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(math.nan)
    with pytest.raises(FedproxyError, match="Lower learning_rate"):
        train(model, examples, SETTINGS, pad=256, seed=0)
    assert all(torch.equal(v, state[n]) for n, v in adapter_state(model).items())
