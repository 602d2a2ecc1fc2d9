import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import model_identity
from fedproxy.compression.compress import Proxy, compress
from fedproxy.config import Heal
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models.checkpoints import load_model, load_tokenizer
from tests.conftest import BLOCKS, FAMILIES, make_model
from tests.in_memory import skipping
from tests.models.test_source import with_own_code
from tests.test_side_files import STRANGERS

Checkpoint = Callable[..., Path]
IDS = torch.arange(30).reshape(2, 15)


def skipped_logits(model: Any, keep: list[int]) -> torch.Tensor:
    with torch.no_grad(), skipping(model, sorted(set(range(BLOCKS)) - set(keep))):
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_proxy_is_the_llm_with_blocks_skipped(
    family: str, tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    proxy = compress(tiny_checkpoint(family), tmp_path / "proxy", calibration=calibration, max_length=24)
    assert len(proxy.layer_map) == 3
    assert (
        sorted(proxy.layer_map, key=lambda i: -proxy.scores[i]) == sorted(range(6), key=lambda i: -proxy.scores[i])[:3]
    )
    model = AutoModelForCausalLM.from_pretrained(proxy.path)
    with torch.no_grad():
        found = model(IDS, use_cache=False).logits
    assert torch.equal(found, skipped_logits(make_model(family), proxy.layer_map))


def test_offsite_tuning_keeps_its_ends_and_spreads_the_blocks_between_evenly(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm = tiny_checkpoint(num_hidden_layers=12)
    proxy = compress(llm, tmp_path / "ot", remove=0.5, score="uniform", keep_first=2, keep_last=2)
    assert proxy.layer_map == [0, 1, 2, 9, 10, 11]  # E = 2 ... 9, k = 2: round(i · 7 / 1)
    proxy = compress(llm, tmp_path / "biot", remove=0.5, score="uniform", keep_last=2)
    assert proxy.layer_map == [0, 3, 6, 9, 10, 11]  # E = 0 ... 9, k = 4: round(i · 9 / 3)
    with pytest.raises(UsageError, match="leave 8 of 12 blocks"):
        compress(llm, tmp_path / "no", remove=0.75, score="uniform", keep_first=2, keep_last=2)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_healing_can_leave_the_ends_as_they_are(
    mode: str, tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    heal = Heal(steps=2, mode=mode, batch_size=2, max_length=16, lora_r=2, spare_ends=True)  # type: ignore[arg-type]
    options: dict[str, Any] = {"score": "uniform", "calibration": calibration, "keep_first": 1, "keep_last": 1}
    proxy = compress(tiny_checkpoint(), tmp_path / "proxy", heal=heal, **options)
    plain = compress(tiny_checkpoint(), tmp_path / "plain", **options)
    before, after = (load_file(path / "model.safetensors") for path in (plain.path, proxy.path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[2] for name in changed} == {"1"}
    with pytest.raises(UsageError, match="spare_ends"):
        compress(tiny_checkpoint(), tmp_path / "no", heal=heal, **{**options, "keep_first": 2})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_proxy_holds(tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    llm = tiny_checkpoint(dtype=dtype)
    told: list[tuple[float, str]] = []
    sheets: list[dict[str, Any]] = []

    def on_sheet(sheet: dict[str, Any]) -> None:
        assert not (tmp_path / "a").exists()
        sheets.append(sheet)

    options = {"remove": 0.34, "samples": 5, "max_length": 16, "seed": 4}
    proxy = compress(
        llm,
        tmp_path / "a",
        calibration=calibration,
        on_progress=lambda f, t: told.append((f, t)),
        on_sheet=on_sheet,
        **options,
    )
    manifest = Manifest.read(proxy.path)
    assert proxy == Proxy(tmp_path / "a", manifest.layer_map, manifest.scores or [])
    assert (manifest.kind, manifest.llm_sha256, manifest.llm_blocks) == ("proxy", model_identity(llm), 6)
    assert len(proxy.layer_map) == 4
    weights = load_file(proxy.path / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {dtype}
    settings = dict(manifest.settings)
    sheet = settings.pop("exposure")
    assert settings == {
        "remove": 0.34,
        "score": "block-influence",
        "keep_first": 0,
        "keep_last": 0,
        "samples": 5,
        "max_length": 16,
        "parameters": sum(t.numel() for t in weights.values()),
        "healed": False,
    }
    assert sheets == [sheet]
    assert sheet["bytes"] == sum(t.nbytes for t in weights.values())
    assert 0 < sheet["share"] < 1
    assert sheet["perplexity"]["tokens"] > 0
    assert (manifest.seed, len(manifest.calibration_sha256 or "")) == (4, 64)
    whole = load_file(llm / "model.safetensors")
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(proxy.layer_map[int(parts[2])])
        assert torch.equal(tensor, whole[".".join(parts)])
    assert (proxy.path / "tokenizer.json").read_bytes() == (llm / "tokenizer.json").read_bytes()
    tokens = AutoTokenizer.from_pretrained(proxy.path)("long " * 50)["input_ids"]
    assert tokens == AutoTokenizer.from_pretrained(llm)("long " * 50)["input_ids"]
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in proxy.path.iterdir()} == {(tmp_path / "new").stat().st_mode}
    assert (proxy.path / "generation_config.json").is_file()
    assert [f for f, _ in told] == sorted(f for f, _ in told)
    assert (told[0][0], told[-1][0]) == (0.0, 1.0)

    again = compress(llm, tmp_path / "b", calibration=calibration, **options)
    assert again.scores == proxy.scores
    for file in proxy.path.iterdir():
        assert file.read_bytes() == (again.path / file.name).read_bytes()


def test_long_documents_fit_into_the_positions_of_the_model(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 300)
    compress(tiny_checkpoint("gpt2"), tmp_path / "proxy", calibration=tmp_path / "long.txt")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"remove": 1.0}, UsageError, "remove"),
        ({"remove": float("nan")}, UsageError, "remove"),
        ({"score": "bloc-influence"}, UsageError, "block-influence"),
        ({"samples": 0}, UsageError, "samples"),
        ({"max_length": 0}, UsageError, "max_length"),
        ({"calibration": "absent.txt"}, ArtifactError, "absent.txt"),
        ({"calibration": None}, UsageError, "needs public text"),
        ({"calibration": None, "score": "uniform", "heal": Heal(steps=1)}, UsageError, "Healing needs public text"),
        ({"placement": "disk"}, UsageError, "stream"),
        ({"llm": "/absent"}, ArtifactError, "no checkpoint"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    tiny_checkpoint: Checkpoint,
    calibration: Path,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    arguments: dict[str, Any] = {"llm": tiny_checkpoint(), "calibration": calibration, **options}
    with pytest.raises(error, match=message):
        compress(arguments.pop("llm"), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path) -> None:
    def interrupt(fraction: float, _text: str) -> None:
        if fraction > 0.8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tiny_checkpoint(), tmp_path / "out", calibration=calibration, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_no_path_of_the_machine_is_written_down(tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path) -> None:
    proxy = compress(tiny_checkpoint(), tmp_path / "out", calibration=calibration)
    for file in proxy.path.iterdir():
        assert str(tiny_checkpoint().parent).encode() not in file.read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()


def test_an_existing_output_is_kept_unless_told_otherwise(
    tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(UsageError, match="overwrite"):
        compress(tiny_checkpoint(), tmp_path / "out", calibration=calibration)
    assert (tmp_path / "out" / "mine").is_file()
    with pytest.raises(UsageError, match="not made by fedproxy"):
        compress(tiny_checkpoint(), tmp_path / "out", calibration=calibration, overwrite=True)
    assert (tmp_path / "out" / "mine").is_file()
    for remove in (0.5, 0.25):
        compress(tiny_checkpoint(), tmp_path / "proxy", remove=remove, calibration=calibration, overwrite=True)
    assert Manifest.read(tmp_path / "proxy").settings["remove"] == 0.25


def test_nothing_that_is_read_is_replaced(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "parent" / "llm"))
    (tmp_path / "link").symlink_to(llm)
    for name in ("parent", "parent/llm", "text"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "fedproxy.json").write_text("{}")
    (tmp_path / "text" / "public.txt").write_text("text")
    public = tmp_path / "text" / "public.txt"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    texts: list[dict[str, Any]] = [{"calibration": public}, {"heal": Heal(steps=1, text=str(public))}]
    for out in (llm, tmp_path / "link", tmp_path / "parent", llm / "proxy", tmp_path / "text"):
        for given in texts:
            with pytest.raises(UsageError, match="which is read"):
                compress(llm, out, score="uniform", overwrite=True, **given)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_named_as_that_of_healing_is_left_alone(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "proxy.heal"))
    compress(llm, tmp_path / "proxy", score="uniform")
    assert model_identity(llm) == model_identity(tiny_checkpoint())


def test_blocks_that_depend_on_their_position_are_refused(
    tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    """GPT-2 can scale attention by the block's number; block 0 does next to nothing here, so that it goes."""
    model = make_model("gpt2", scale_attn_by_inverse_layer_idx=True, initializer_range=0.5)
    with torch.no_grad():
        for linear in (model.transformer.h[0].attn.c_proj, model.transformer.h[0].mlp.c_proj):
            linear.weight.zero_()
    llm = Path(shutil.copytree(tiny_checkpoint("gpt2"), tmp_path / "llm"))
    model.save_pretrained(llm)
    with pytest.raises(ArtifactError, match="depends on its position"):
        compress(llm, tmp_path / "out", calibration=calibration)
    assert list(tmp_path.iterdir()) == [llm]


def test_a_proxy_of_an_llm_with_its_own_code_brings_the_code(
    tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    llm = with_own_code(tiny_checkpoint(), tmp_path / "llm")
    with pytest.raises(ArtifactError, match="trust_remote_code"):
        compress(llm, tmp_path / "out", calibration=calibration)
    proxy = compress(llm, tmp_path / "out", calibration=calibration, trust_remote_code=True)
    assert (proxy.path / "own.py").is_file()
    plain = compress(tiny_checkpoint(), tmp_path / "plain", calibration=calibration)
    assert proxy.layer_map == plain.layer_map
    with torch.no_grad():
        found = load_model(proxy.path, trust_remote_code=True)(IDS).logits
        assert torch.equal(found, AutoModelForCausalLM.from_pretrained(plain.path)(IDS).logits)


def test_an_llm_with_its_own_code_is_refitted(
    tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    llm, heal = with_own_code(tiny_checkpoint(), tmp_path / "llm"), Heal(refit=4, max_length=24)
    proxy = compress(llm, tmp_path / "out", calibration=calibration, heal=heal, trust_remote_code=True)
    assert Manifest.read(proxy.path).settings["refit"]["gaps"]


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_a_model_that_cannot_be_refitted_is_told_before_its_blocks_are_scored(
    family: str, tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    with pytest.raises(UsageError, match="refit = 0"):
        compress(
            tiny_checkpoint(family),
            tmp_path / "proxy",
            calibration=calibration,
            heal=Heal(refit=4, max_length=24),
            on_progress=lambda _, text: told.append(text),
        )
    assert "scoring the blocks" not in told
    assert not (tmp_path / "proxy").exists()


def test_where_no_block_goes_no_model_is_refused_for_a_refit(
    tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    heal = Heal(refit=4, steps=1, max_length=24)
    proxy = compress(tiny_checkpoint("gemma2"), tmp_path / "out", remove=0, calibration=calibration, heal=heal)
    assert Manifest.read(proxy.path).settings["refit"]["gaps"] == []


def test_no_path_of_the_llms_settings_is_in_the_proxy_and_it_computes_the_same(
    tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    llm = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "llm"))
    planted = {"_name_or_path": "/home/ann", "data": {"rows": ["/home/ann/rows.jsonl"]}, "/home/ann": 1}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        record = json.loads((llm / name).read_text())
        (llm / name).write_text(json.dumps(record | planted))
    for name in STRANGERS:
        (llm / name).write_text("stays")
    proxy = compress(llm, tmp_path / "out", calibration=calibration)
    plain = compress(tiny_checkpoint(), tmp_path / "plain", calibration=calibration)
    assert {file.name for file in proxy.path.iterdir()} == {file.name for file in plain.path.iterdir()}
    for file in (file for file in proxy.path.iterdir() if file.name != "fedproxy.json"):
        assert b"ann" not in file.read_bytes()
        if not file.name.endswith("config.json"):
            assert file.read_bytes() == (plain.path / file.name).read_bytes()
    assert load_tokenizer(proxy.path)("a long </s> text").input_ids == load_tokenizer(llm)("a long </s> text").input_ids
    with torch.no_grad():
        assert torch.equal(load_model(proxy.path)(IDS).logits, load_model(plain.path)(IDS).logits)


def test_a_tokenizer_of_another_model_is_refused(
    tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    llm = tiny_checkpoint(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ArtifactError, match="50"):
        compress(llm, tmp_path / "out", calibration=calibration)


def test_an_llm_that_overflows_is_refused(tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("inf"))
    llm = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "llm"))
    model.save_pretrained(llm)
    with pytest.raises(ArtifactError, match="block 2 is NaN"):
        compress(llm, tmp_path / "out", calibration=calibration)


def test_versions_are_written_down(tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path) -> None:
    compress(tiny_checkpoint(), tmp_path / "out", calibration=calibration)
    assert {"torch", "transformers"} <= json.loads((tmp_path / "out" / "fedproxy.json").read_text())["versions"].keys()


@pytest.mark.parametrize("score", ["uniform", "random", "magnitude"])
def test_scores_that_read_no_text_do_without_it(score: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    proxy = compress(tiny_checkpoint(), tmp_path / "out", score=score)
    manifest = Manifest.read(proxy.path)
    assert len(proxy.layer_map) == 3
    assert (manifest.calibration_sha256, manifest.settings["samples"]) == (None, 0)
    assert manifest.settings["exposure"]["perplexity"] is None


def test_the_same_proxy_from_memory_and_from_the_files(
    tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    made = {
        placement: compress(tiny_checkpoint(), tmp_path / placement, calibration=calibration, placement=placement)
        for placement in ("memory", "stream")
    }
    assert made["memory"].scores == made["stream"].scores
    for file in made["memory"].path.iterdir():
        assert file.read_bytes() == (made["stream"].path / file.name).read_bytes()


def test_a_healed_proxy_says_so_and_leaves_no_work_behind(
    tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    heal = Heal(steps=3, batch_size=2, max_length=24, lora_r=4, learning_rate=0.01)
    plain = compress(tiny_checkpoint(), tmp_path / "plain", calibration=calibration)
    proxy = compress(tiny_checkpoint(), tmp_path / "out", calibration=calibration, heal=heal)
    assert proxy.layer_map == plain.layer_map
    settings = Manifest.read(proxy.path).settings
    assert settings["healed"]
    assert settings["exposure"]["healed"]
    assert set(settings["heal"]["perplexity"]) == {"llm", "before", "after"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]
    before, after = (load_file(folder / "model.safetensors") for folder in (plain.path, proxy.path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".layers." in name for name in changed)
