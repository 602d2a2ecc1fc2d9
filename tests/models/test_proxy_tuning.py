import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedproxy.adapter_files import write_adapter
from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import model_identity
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models import lora
from fedproxy.models.checkpoints import save_checkpoint
from fedproxy.models.families import keep_blocks
from fedproxy.models.proxy_tuned_model import ProxyTunedModel, load_proxy_tuned
from fedproxy.models.proxy_tuning import ProxyTuning, padding_mask
from tests.conftest import FAMILIES, make_model

PAD, END = 256, 258
KEPT = [0, 2, 5]
IDS = torch.arange(40).reshape(2, 20)
PROMPTS = torch.tensor([[PAD] * 7 + [65, 66, 67], list(range(70, 80)), [PAD] * 3 + list(range(90, 97))])
MASK = (PROMPTS != PAD).long()


def noise(model: PeftModel, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: size * torch.randn(t.shape, generator=generator) for name, t in sorted(lora.adapter_state(model).items())
    }
    lora.set_adapter_state(model, tensors)


def make_proxy(family: str = "llama", keep: list[int] = KEPT) -> PeftModel:
    """The proxy with a tuned adapter, nothing trainable."""
    proxy = lora.attach(keep_blocks(make_model(family), keep), r=4, alpha=8, dropout=0.1, seed=0)
    noise(proxy)
    return proxy.requires_grad_(False).eval()


def reference(family: str = "llama", *, alpha: float = 1.0, keep: list[int] = KEPT) -> Any:
    """Three models in memory, three forwards a call, no cache: the LLM, the proxy merged, and the proxy as it was."""
    llm, tuned, untuned = make_model(family), make_proxy(family, keep), keep_blocks(make_model(family), keep)
    merged, whole = tuned.merge_and_unload(), type(llm)

    class Reference(whole):  # type: ignore[misc, valid-type]
        def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **_: Any) -> Any:
            base, up, down = (
                whole.forward(
                    m, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
                ).logits
                for m in (self, self.others.merged, self.others.untuned)
            )
            return CausalLMOutputWithPast(logits=base + alpha * (up - down))

    llm.__class__ = Reference
    llm.others = SimpleNamespace(merged=merged, untuned=untuned)
    return llm


def generate(model: Any, **options: Any) -> Any:
    torch.manual_seed(5)
    defaults = {"max_new_tokens": 12, "attention_mask": MASK, "return_dict_in_generate": True, "output_scores": True}
    return model.generate(PROMPTS, **{**defaults, **options})


def tuned_by_processor(family: str, options: dict[str, Any], **settings: Any) -> Any:
    processor = ProxyTuning(make_proxy(family), **settings)
    return generate(make_model(family), logits_processor=LogitsProcessorList([processor]), **options)


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for left, right in zip(found.scores, expected.scores, strict=True):
        assert torch.allclose(left.log_softmax(-1), right.log_softmax(-1), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_with_padding_equals_three_forwards_without_a_cache(family: str) -> None:
    expected = generate(reference(family, alpha=0.7), do_sample=False, use_cache=False)
    assert_same(tuned_by_processor(family, {"do_sample": False}, alpha=0.7), expected)
    assert not torch.equal(expected.sequences, generate(make_model(family), do_sample=False).sequences)


SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20}
BEAMS = {"do_sample": False, "num_beams": 4, "num_return_sequences": 3}


@pytest.mark.parametrize(
    "options",
    [
        SAMPLED,
        {**SAMPLED, "num_return_sequences": 3},
        BEAMS,
        {**BEAMS, "length_penalty": -1.0, "early_stopping": True},
        {**SAMPLED, "num_beams": 3},
    ],
)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_sampling_and_beams_equal_the_reference(family: str, options: dict[str, Any]) -> None:
    expected = generate(reference(family), use_cache=False, **options)
    for found in (
        tuned_by_processor(family, options),
        generate(ProxyTunedModel(make_model(family), make_proxy(family)), **options),
    ):
        assert_same(found, expected)
        if options.get("num_beams"):
            assert torch.allclose(found.sequences_scores, expected.sequences_scores, atol=1e-4)


def counted(proxy: PeftModel) -> list[tuple[int, int]]:
    """Shapes of all ids that the proxy reads from now on."""
    shapes: list[tuple[int, int]] = []
    proxy.get_base_model().register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_a_token_costs_two_forwards_of_the_proxy_over_that_token_alone() -> None:
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        proxy = make_proxy()
        shapes = counted(proxy)
        processor = LogitsProcessorList([ProxyTuning(proxy)])
        generate(make_model(), logits_processor=processor, max_new_tokens=4, min_new_tokens=4, **options)
        rows = 3 * options.get("num_beams", 1)
        assert shapes == [(rows, 10)] * 2 + [(rows, 1)] * 6


@torch.no_grad()
def test_one_processor_serves_one_prompt_after_the_other() -> None:
    proxy = make_proxy()
    processor, llm = ProxyTuning(proxy), make_model()
    shapes = counted(proxy)
    whole = reference()

    def check(ids: torch.Tensor) -> None:
        mask = padding_mask(ids, PAD)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        options = {"attention_mask": mask, "position_ids": places}
        found = processor(ids, llm(ids, **options).logits[:, -1])
        expected = whole(ids, **options).logits[:, -1].log_softmax(-1)
        assert torch.allclose(found, expected, atol=1e-4)
        assert torch.allclose(found.exp().sum(-1), torch.ones(len(ids)), atol=1e-5)

    other = PROMPTS.roll(1, 0)
    grown = torch.cat([other, IDS[:1, :3].T.repeat(1, 1)], 1)
    for ids, read in [
        (PROMPTS, (3, 10)),
        (PROMPTS, (3, 10)),
        (grown, (3, 1)),
        (grown[[2, 2, 0, 1]], (4, 11)),
        (torch.cat([grown[[1, 1]], IDS[:, :4]], 1), (2, 4)),
        (torch.cat([grown[[1, 2]], IDS[:, 9:14]], 1), (2, 16)),
        (IDS[:, :5], (2, 5)),
        (torch.tensor([[PAD]]), (1, 1)),
    ]:
        check(ids)
        assert shapes[-2:] == [read, read]


def test_padding_is_told_from_the_token_or_from_the_mask() -> None:
    assert torch.equal(padding_mask(PROMPTS, PAD), MASK)
    assert padding_mask(torch.tensor([[7, 7, 7], [7, 1, 7]]), 7).tolist() == [[0, 0, 1], [0, 1, 1]]
    assert padding_mask(PROMPTS, None).min() == 1
    expected = generate(reference(), do_sample=False, use_cache=False)
    assert_same(tuned_by_processor("llama", {"do_sample": False}, attention_mask=MASK, pad_token_id=3), expected)
    read = {"do_sample": False, "attention_mask": torch.ones_like(PROMPTS)}
    expected = generate(reference(), use_cache=False, **read)
    assert_same(tuned_by_processor("llama", read, attention_mask=read["attention_mask"]), expected)


@torch.no_grad()
def test_beams_are_compared_by_log_probabilities_of_the_combined_distribution() -> None:
    found = generate(ProxyTunedModel(make_model(), make_proxy()), **BEAMS, length_penalty=0.0, max_new_tokens=3)
    model = reference()
    for row, (ids, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True)):
        mask = torch.cat([MASK[row // 3], torch.ones(len(ids) - 10, dtype=torch.long)])[None]
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logs = model(ids[None], attention_mask=mask, position_ids=places).logits[0, :-1].log_softmax(-1)
        each = logs.gather(1, ids[1:, None])[9:, 0]
        ended = (ids[10:] == END).int().argmax() + 1 if END in ids[10:] else len(each)
        assert float(each[:ended].sum()) == pytest.approx(float(score), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt_neox"])
def test_alpha_0_is_the_llm_to_the_bit_and_alpha_1_with_the_whole_llm_the_tuned_llm(family: str) -> None:
    llm = make_model(family)
    assert torch.equal(ProxyTunedModel(llm, make_proxy(family), 0.0)(IDS).logits, llm(IDS).logits)
    whole = make_proxy(family, list(range(6)))
    assert torch.allclose(ProxyTunedModel(llm, whole)(IDS).logits, whole(IDS).logits, atol=1e-4)


@torch.no_grad()
def test_the_combined_model_is_the_formula_and_gives_it_in_float32() -> None:
    tuned, untuned, llm = make_proxy(), keep_blocks(make_model(), KEPT), make_model()
    found = ProxyTunedModel(llm, tuned, 0.5)(IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.allclose(found, llm(IDS).logits + 0.5 * (tuned(IDS).logits - untuned(IDS).logits), atol=1e-5)
    narrow = ProxyTunedModel(make_model(dtype=torch.bfloat16), tuned.to(torch.bfloat16))
    assert narrow(IDS).logits.dtype == torch.float32
    assert narrow.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_the_joint_cache_goes_on_where_it_was_and_its_rows_can_be_chosen(family: str) -> None:
    model = ProxyTunedModel(make_model(family), make_proxy(family))
    whole = model(IDS).logits
    first = model(IDS[:, :12], use_cache=True, logits_to_keep=1)
    assert torch.allclose(first.logits, whole[:, 11:12], atol=1e-4)
    first.past_key_values.batch_select_indices(torch.tensor([1, 0, 1]))
    rest = model(IDS[[1, 0, 1], 12:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(rest.logits, whole[[1, 0, 1], 12:], atol=1e-4)
    assert model(IDS).past_key_values is None


def test_the_proxy_is_left_as_it_was() -> None:
    proxy = make_proxy()
    before = {name: value.clone() for name, value in proxy.state_dict().items()}
    with torch.no_grad():
        logits = proxy(IDS).logits
    trained = sorted(name for name, _ in proxy.named_parameters())[::3]
    for name, parameter in proxy.named_parameters():
        parameter.requires_grad_(name in trained)
    generate(ProxyTunedModel(make_model(), proxy), max_new_tokens=2)
    assert sorted(name for name, parameter in proxy.named_parameters() if parameter.requires_grad) == trained
    assert all(torch.equal(value, before[name]) for name, value in proxy.state_dict().items())
    with torch.no_grad():
        assert torch.equal(proxy(IDS).logits, logits)


@torch.no_grad()
def test_a_fully_trained_head_counts_as_part_of_the_adapter() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    proxy = get_peft_model(keep_blocks(make_model(), KEPT), config).eval()
    proxy.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    with proxy.disable_adapter():
        untuned = proxy(IDS).logits
    llm = make_model()
    expected = llm(IDS).logits + proxy(IDS).logits - untuned
    assert torch.allclose(ProxyTunedModel(llm, proxy)(IDS).logits, expected, atol=1e-4)


def test_what_cannot_be_combined_is_refused() -> None:
    llm, proxy = make_model(), make_proxy()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match="alpha"):
            ProxyTuning(proxy, bad)
    with pytest.raises(UsageError, match="as a PEFT model"):
        ProxyTuning(llm)
    with pytest.raises(UsageError, match=r"eval\(\)"):
        ProxyTuning(copy.deepcopy(proxy).train())
    off = copy.deepcopy(proxy)
    off.base_model.disable_adapter_layers()
    with pytest.raises(UsageError, match="switched off"):
        ProxyTuning(off)
    with pytest.raises(UsageError, match="Make a new ProxyTuning"):
        ProxyTuning(proxy, attention_mask=MASK)(IDS, torch.zeros(2, 260))
    larger = make_model(vocab_size=270)
    with pytest.raises(ArtifactError, match=r"\b270\b.*\b260\b"):
        ProxyTunedModel(larger, proxy)
    with pytest.raises(ArtifactError, match=r"\b270\b.*\b260\b"):
        larger.generate(IDS, logits_processor=LogitsProcessorList([ProxyTuning(proxy)]), max_new_tokens=2)


def write_proxy(llm: Path, directory: Path, keep: list[int]) -> Path:
    directory.mkdir()
    save_checkpoint(directory, keep_blocks(lora.load_model(llm), keep), llm)
    Manifest("proxy", model_identity(llm), 6, keep).write(directory)
    return directory


@pytest.fixture(scope="module")
def artifacts(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """LLM, proxy and adapter on disk."""
    folder, llm = tmp_path_factory.mktemp("tuned"), tiny_checkpoint()
    proxy = write_proxy(llm, folder / "proxy", KEPT)
    model = lora.attach(lora.load_model(proxy), r=4, alpha=8, dropout=0.0, seed=0)
    noise(model)
    (folder / "adapter").mkdir()
    manifest = Manifest("proxy-adapter", model_identity(llm), 6, KEPT)
    write_adapter(folder / "adapter", lora.adapter_config(model), lora.adapter_state(model), manifest)
    return llm, proxy, folder / "adapter"


@torch.no_grad()
def test_what_is_on_disk_is_loaded_as_one_model(artifacts: tuple[Path, Path, Path]) -> None:
    llm, proxy, adapter = artifacts
    model = load_proxy_tuned(llm, proxy, adapter, alpha=0.5)
    assert not model.training
    tuned, untuned = lora.load_with_adapter(proxy, adapter), lora.load_model(proxy)
    expected = lora.load_model(llm)(IDS).logits + 0.5 * (tuned(IDS).logits - untuned(IDS).logits)
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.proxy.parameters())


def test_artifacts_that_do_not_belong_together_are_refused(
    artifacts: tuple[Path, Path, Path], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    llm, proxy, adapter = artifacts
    with pytest.raises(ArtifactError, match="proxy of another LLM"):
        load_proxy_tuned(tiny_checkpoint(num_hidden_layers=5), proxy, adapter)
    with pytest.raises(ArtifactError, match=r"fedproxy\.json"):
        load_proxy_tuned(llm, llm, adapter)
    with pytest.raises(ArtifactError, match="not a proxy"):
        load_proxy_tuned(llm, adapter, adapter)
    with pytest.raises(ArtifactError, match="tuned on the proxy"):
        load_proxy_tuned(llm, proxy, proxy)
    with pytest.raises(ArtifactError, match="other blocks"):
        load_proxy_tuned(llm, write_proxy(llm, tmp_path / "other", [0, 1, 2]), adapter)
