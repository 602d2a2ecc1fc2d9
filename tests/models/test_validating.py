import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedproxy.config import Train
from fedproxy.evaluation import evaluate, training_rows
from fedproxy.models import validating
from fedproxy.models.encoding import encode, training_examples
from fedproxy.models.layouts import IGNORED, collate
from fedproxy.models.lora import adapter_parameters, train_only, without_adapter
from fedproxy.models.trainable import attach_adapter
from fedproxy.models.validating import MOST_LABELS, OPTIONS, BrokenModelError, encode_validation, labels_of, measure
from tests.conftest import make_model, make_tokenizer
from tests.models.test_turns import MARKED, PLAIN, TALK, tokenizer_of

WORDS = ["red", "green", "blue"]
ROWS = [{"prompt": f"the river {i} is", "completion": f" {WORDS[i % 3]}"} for i in range(12)]


@pytest.fixture
def model():
    """A proxy with an adapter that changes what it computes."""
    made = attach_adapter(make_model(), Train(lora_r=2, lora_alpha=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(made).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


def test_the_loss_is_that_of_each_completion_token_by_itself(model):
    tokenizer = make_tokenizer()
    examples = encode(ROWS, tokenizer, max_length=64)
    sums, count = 0.0, 0
    model.eval()
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([list(example.ids)])).logits[0].log_softmax(-1)
        for place in range(example.start, len(example.ids)):
            sums -= float(logits[place - 1, example.ids[place]])
            count += 1
    for size in (1, 5, 64):
        validation = encode_validation(ROWS, [], tokenizer, Train(), 64)
        loss, accuracy = measure(model, validation, pad=0, batch_size=size)
        assert (loss, accuracy) == (pytest.approx(sums / count, abs=1e-5), None)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("train", [Train(), Train(completion_only_loss=False), Train(assistant_only_loss=True)])
@pytest.mark.parametrize("kind", ["pairs", "texts", "talks"])
def test_the_loss_is_over_the_labels_that_training_makes_of_the_same_rows(model, kind, train, template):
    """The last row is too long: it is cut as in training."""
    tokenizer = tokenizer_of(template)
    rows = {
        "pairs": [*ROWS, {"prompt": "the river " * 9, "completion": " blue"}],
        "texts": [{"text": "the river"}, {"text": "the sea " * 30}],
        "talks": [{"messages": TALK[3:5]}, {"messages": TALK[3:]}, {"messages": [TALK[0], *TALK[3:]]}],
    }[kind]
    learned = training_examples(rows, tokenizer, train, 80)
    sums, count = 0.0, 0
    model.eval()
    for example in learned:
        batch = collate([example], 0)
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logs = model(**batch).logits[0, :-1].log_softmax(-1)
        counts = labels != IGNORED
        sums -= float(logs[counts].gather(1, labels[counts][:, None]).sum())
        count += int(counts.sum())
    validation = encode_validation(rows, [], tokenizer, train, 80)
    assert torch.equal(collate(validation.examples, 0)["labels"], collate(learned, 0)["labels"])
    assert measure(model, validation, pad=0, batch_size=2)[0] == pytest.approx(sums / count, abs=1e-5)


def test_all_turns_of_the_assistant_count_only_where_training_counts_them():
    tokenizer, rows = tokenizer_of(MARKED), [{"messages": TALK[3:]}]

    def counted(**train):
        return encode_validation(rows, [], tokenizer, Train(**train), 128).examples[0].counting

    assert counted() < counted(assistant_only_loss=True) < counted(completion_only_loss=False)


@pytest.mark.parametrize("labels", [[], WORDS])
def test_it_is_told_of_every_text_that_it_read(model, labels):
    validation, told = encode_validation(ROWS, labels, make_tokenizer(), Train(), 64), []
    measure(model, validation, pad=0, batch_size=5, on_read=lambda *read: told.append(read))
    texts = len(ROWS) * (1 + len(labels))
    assert told == [(5, texts), (10, texts), *((read, texts) for read in range(12, texts + 1))]


@pytest.mark.parametrize("labels", [[], WORDS, ["red", "green"], ["a", "b"]])
def test_its_tokens_are_those_that_pass_the_model(model, labels):
    """One text or one context at a time, with answers of one length or one answer cut short, nothing is padded."""
    rows = [*ROWS, ROWS[0]] if labels == ["a", "b"] else ROWS
    validation, passed = encode_validation(rows, labels, make_tokenizer(), Train(), 64), []
    read = model.get_base_model().model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: passed.append(inputs[0])
    )
    measure(model, validation, pad=0, batch_size=1)
    read.remove()
    texts, contexts = len(validation.examples), {tuple(r[0]) for q in validation.questions for r in q.requests}
    probe = bool(labels)  # of one token, whether the model keeps a cache
    assert len(passed) == texts + probe + 2 * len(contexts)
    padded = sum(int((ids == 0).sum()) for ids in passed) - probe
    assert validation.tokens == sum(ids.numel() for ids in passed) - probe - padded


@pytest.mark.parametrize("own", [False, True])
def test_the_accuracy_is_the_harness_acc_of_the_same_rows(model, tmp_path, own):
    """Of a file whose answers are labels, and of a task, whose options may differ from row to row."""
    documents = [{"text": f"the river {i} is", "colour": WORDS[i % 3]} for i in range(12)]
    if own:
        documents = [{**row, "more": WORDS[i % 2 :] + WORDS[: i % 2]} for i, row in enumerate(documents)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, documents)))
    choices = "doc_to_choice: more\n" if own else f"doc_to_choice: {json.dumps(sorted(WORDS))}\n"
    (tmp_path / "rivers.yaml").write_text(
        "task: rivers\ndataset_path: json\ndataset_kwargs: {data_files: {train: rows.jsonl, test: rows.jsonl}}\n"
        "training_split: train\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\n"
        f"{choices}doc_to_target: colour\nmetric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]\n"
    )
    rows = training_rows("rivers", include=tmp_path, options=True) if own else ROWS
    assert all((OPTIONS in row) is own for row in rows)
    tokenizer = make_tokenizer()
    validation = encode_validation(rows, labels_of(ROWS), tokenizer, Train(), 64)
    _, found = measure(model, validation, pad=0, batch_size=8)
    expected = evaluate(model, tokenizer=tokenizer, tasks=["rivers"], include=tmp_path)["tasks"]["rivers"]
    assert (found, len(rows)) == (pytest.approx(expected["acc"], abs=1e-6), expected["n"])
    assert 0 < found < 1


@given(st.lists(st.sampled_from([f"a{n}" for n in range(MOST_LABELS + 5)]), min_size=1, max_size=99))
def test_answers_are_labels_where_they_are_few_and_come_again(answers):
    found = labels_of([{"prompt": "?", "completion": answer} for answer in answers])
    different = sorted(set(answers))
    assert found == (different if 2 <= len(different) <= MOST_LABELS and len(different) <= len(answers) / 2 else [])
    assert found == labels_of([{"messages": [{"content": "?"}, {"content": answer}]} for answer in answers])
    assert labels_of([{"text": answer} for answer in answers]) == []


def test_a_model_that_is_broken_gives_no_score(model):
    validation = encode_validation(ROWS, [], make_tokenizer(), Train(), 64)
    with torch.no_grad():
        next(iter(adapter_parameters(model).values())).fill_(math.nan)
    with pytest.raises(BrokenModelError, match="nan"):
        measure(model, validation, pad=0, batch_size=4)


def test_without_its_adapter_it_is_the_bare_model_and_trains_the_same_tensors_afterwards(model):
    validation = encode_validation(ROWS, [], make_tokenizer(), Train(), 64)
    train_only(model, lambda name: "lora_B" in name)
    before = {name: p.requires_grad for name, p in adapter_parameters(model).items()}
    with without_adapter(model):
        found = measure(model, validation, pad=0, batch_size=4)[0]
    assert {name: p.requires_grad for name, p in adapter_parameters(model).items()} == before
    bare = attach_adapter(make_model(), Train(lora_r=2))  # a fresh adapter changes nothing
    assert found == pytest.approx(validating.measure(bare, validation, pad=0, batch_size=4)[0], abs=1e-6)
