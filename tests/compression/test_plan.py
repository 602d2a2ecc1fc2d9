from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedproxy.compression.compress import compress
from fedproxy.compression.plan import RATIOS, plan
from fedproxy.compression.scores import SCORES
from fedproxy.config import Train
from fedproxy.errors import ArtifactError, UsageError

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("score", sorted(SCORES))
def test_the_plan_is_what_compress_does(
    score: str, tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    text = calibration if SCORES[score].reads_text else None
    settings = {"calibration": text, "score": score, "samples": 3, "max_length": 16, "seed": 2}
    for remove in (0.5, 0.2):
        found = plan(tiny_checkpoint(), remove=remove, ratios=[0.5, 0.7], **settings)  # type: ignore[arg-type]
        proxy = compress(tiny_checkpoint(), tmp_path / str(remove), remove=remove, **settings)  # type: ignore[arg-type]
        weights = load_file(proxy.path / "model.safetensors").values()
        assert found.chosen.keep == proxy.layer_map
        assert found.chosen.bytes == sum(tensor.nbytes for tensor in weights)
        assert found.chosen.parameters == sum(tensor.numel() for tensor in weights)
        if score != "perplexity":
            assert found.scores == proxy.scores
        assert [option.remove for option in found.options] == sorted({0.5, 0.7, remove})


@pytest.mark.parametrize("score", ["magnitude", "uniform"])
def test_kept_ends_are_kept_and_bound_the_ratios(score: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    settings = {"remove": 0.34, "score": score, "keep_first": 2, "keep_last": 1}
    found = plan(tiny_checkpoint(), **settings)  # type: ignore[arg-type]
    assert found.chosen.keep == compress(tiny_checkpoint(), tmp_path / "proxy", **settings).layer_map  # type: ignore[arg-type]
    assert [option.remove for option in found.options] == [0.2, 0.3, 0.34, 0.4, 0.5, 0.6]
    assert all({0, 1, 5} <= set(option.keep) for option in found.options)
    with pytest.raises(UsageError, match="keep_first"):
        plan(tiny_checkpoint(), **{**settings, "remove": 0.7})  # type: ignore[arg-type]


def test_every_ratio_costs_less_than_the_one_before(tiny_checkpoint: Checkpoint) -> None:
    found = plan(tiny_checkpoint("gpt2"), score="uniform")
    assert [option.remove for option in found.options] == list(RATIOS[1:])
    assert [len(option.keep) for option in found.options] == [5, 5, 4, 3, 3, 2, 2, 1]
    for more, less in zip(found.options, found.options[1:], strict=False):
        if len(more.keep) > len(less.keep):
            assert more.parameters > less.parameters
            assert more.bytes > less.bytes
            assert more.cpu_memory > less.cpu_memory
            assert more.gpu_memory > less.gpu_memory
    whole = plan(tiny_checkpoint("gpt2"), remove=0.0, score="uniform").chosen
    assert (whole.parameters, whole.bytes) == (found.parameters, found.bytes)


def test_train_settings_count(tiny_checkpoint: Checkpoint) -> None:
    small, large = (
        plan(tiny_checkpoint(), score="magnitude", train=Train(batch_size=size)).chosen.cpu_memory for size in (2, 32)
    )
    assert 4 * small < large


@pytest.mark.parametrize("family", ["gemma3", "llava", "opt", "gpt_neox", "bloom", "mixtral", "phi3"])
def test_other_families(family: str, tiny_checkpoint: Checkpoint) -> None:
    assert plan(tiny_checkpoint(family), score="magnitude").chosen.gpu_memory > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"remove": 1.0}, UsageError, "remove"),
        ({"remove": 0.1}, UsageError, "removes none of the 6 blocks"),
        ({"ratios": [0.5, -1]}, UsageError, "remove"),
        ({"score": "angular"}, UsageError, "angular-distance"),
        ({"score": "perplexity"}, UsageError, "public text"),
        ({"placement": "cloud"}, UsageError, "placement"),
        ({"llm": "/absent"}, ArtifactError, "no checkpoint"),
    ],
)
def test_bad_input(
    options: dict[str, object], error: type[Exception], message: str, tiny_checkpoint: Checkpoint
) -> None:
    settings = {"llm": tiny_checkpoint(), "score": "uniform", **options}
    with pytest.raises(error, match=message):
        plan(**settings)  # type: ignore[arg-type]
