import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["red", "green", "blue", "small", "old", "new", "river", "stone", "bird", "tree", "runs", "sings", "falls"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sentence(generator: random.Random, length: int = 6) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(3, length)))


def choices_row(generator: random.Random, question: str) -> dict[str, Any]:
    options = [sentence(generator, 4) for _ in range(4)]
    labels = list(generator.choice(["ABCD", "1234"]))
    text = sentence(generator) + generator.choice(["", "", " "])
    return {question: text, "choices": {"text": options, "label": labels}, "answerKey": generator.choice(labels)}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in the Hub's schema: sst2, mnli, arc_easy, openbookqa."""
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    for split, count in (("train", 12), ("validation", 7), ("test", 6)):
        sentences = [{"sentence": sentence(generator), "label": i % 2, "idx": i} for i in range(count)]
        write_rows(folder / "sst2" / f"{split}.jsonl", sentences)
        pairs = [
            {"premise": sentence(generator), "hypothesis": sentence(generator), "label": i % 3, "idx": i}
            for i in range(count)
        ]
        write_rows(folder / "mnli" / f"{'validation_matched' if split == 'validation' else split}.jsonl", pairs)
        arc = [{"id": str(i), **choices_row(generator, "question")} for i in range(count)]
        write_rows(folder / "arc_easy" / f"{split}.jsonl", arc)
        openbook = [{"id": str(i), **choices_row(generator, "question_stem")} for i in range(count)]
        write_rows(folder / "openbookqa" / f"{split}.jsonl", openbook)
    return folder


@pytest.fixture(scope="session")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own tasks: colours (a choice, with a description) and spelling (generation)."""
    folder = tmp_path_factory.mktemp("include")
    rows = [{"text": f"the {word} river", "colour": word} for word in ("red", "green", "blue")]
    for split in ("train", "test"):
        write_rows(folder / "colours" / f"{split}.jsonl", rows)
    (folder / "colours" / "base.yaml").write_text(
        "dataset_path: json\n"
        "dataset_kwargs: {data_files: {train: train.jsonl, test: test.jsonl}}\n"
        "training_split: train\ntest_split: test\n"
    )
    (folder / "colours" / "colours.yaml").write_text(
        'include: base.yaml\ntask: colours\noutput_type: multiple_choice\ndescription: "Name the colour.\\n"\n'
        "doc_to_text: '{{text}} is'\ndoc_to_choice: [red, green, blue]\ndoc_to_target: colour\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "colours" / "spelling.yaml").write_text(
        "include: base.yaml\ntask: spelling\noutput_type: generate_until\n"
        "doc_to_text: 'Spell {{colour}}:'\ndoc_to_target: \"{{colour | list | join('-')}}\"\n"
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 3}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    return folder


@pytest.fixture(scope="session")
def make_tokenizer(data: Path) -> Callable[[bool], PreTrainedTokenizerFast]:
    """A byte-level BPE of 300 tokens, which puts <s> before a text or does not."""

    def make(adds_bos: bool) -> PreTrainedTokenizerFast:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.train_from_iterator(
            [path.read_text() for path in sorted(data.rglob("*.jsonl"))],
            trainers.BpeTrainer(
                vocab_size=300,
                special_tokens=["<pad>", "<s>", "</s>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        if adds_bos:
            core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
        )

    return make


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def lower_is_better(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own tasks on one set of rows: hits, where more is better; mistakes and text, where less is."""
    folder = tmp_path_factory.mktemp("lower")
    write_rows(
        folder / "test.jsonl", [{"text": f"the {word} river", "colour": word} for word in ("red", "green", "blue")]
    )
    (folder / "tools.py").write_text(
        "def hits(doc, results):\n    best = max(range(3), key=lambda i: results[i][0])\n"
        "    return {'acc': float(['red', 'green', 'blue'][best] == doc['colour'])}\n"
        "def mistakes(doc, results):\n    return {'mistakes': 1.0 - hits(doc, results)['acc']}\n"
    )
    base = "dataset_path: json\ndataset_kwargs: {data_files: {test: test.jsonl}}\ntest_split: test\n"
    for name, metric, higher in (("hits", "acc", "true"), ("mistakes", "mistakes", "false")):
        (folder / f"{name}.yaml").write_text(
            f"{base}task: {name}\noutput_type: multiple_choice\ndoc_to_text: '{{{{text}}}} is'\n"
            "doc_to_choice: [red, green, blue]\ndoc_to_target: colour\n"
            f"process_results: !function tools.{name}\n"
            f"metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: {higher}}}]\n"
        )
    (folder / "text.yaml").write_text(
        f"{base}task: text\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{text}}}}'\n"
        "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]\n"
    )
    return folder
