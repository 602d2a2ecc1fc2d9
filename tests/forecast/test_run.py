"""What a dry run says is what a run does: tokens, steps and bytes to the last one."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedproxy.artifacts import Manifest
from fedproxy.config import Heal, load_experiment
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.federation.client_rows import client_rows
from fedproxy.federation.wire import packed_bytes
from fedproxy.forecast import Speed, forecast_run, given_speed, measure_speed
from fedproxy.forecast.run import few_steps, loud_noise
from fedproxy.models.costs import matrices, training
from fedproxy.pipeline import federate, read_experiment
from tests.conftest import make_tokenizer

Checkpoint = Callable[..., Path]
SPEED = Speed(2e9, "for the test")
CLIENTS = {"colours": 7, "numbers": 4, "places": 9}


def write(folder: Path, llm: Path, calibration: Path, *, train: str = "", rounds: int = 2, federate: str = "") -> Path:
    tables = ""
    for name, count in CLIENTS.items():
        rows = [{"prompt": f"say {name} {'very ' * i}{i}:", "completion": f" {name[: i + 1]}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tables += f'[[client]]\nname = "{name}"\ndata = "{name}.jsonl"\n'
        if "product" in federate and name == "numbers":
            tables += "lora_r = 1\n"
    path = folder / "experiment.toml"
    path.write_text(
        f'[llm]\npath = "{llm}"\n[compress]\ncalibration = "{calibration}"\nmax_length = 32\nscore = "uniform"\n'
        f"{tables}[train]\nbatch_size = 2\nlearning_rate = 1e-2\nlora_r = 2\nmax_length = 48\n{train}\n"
        f"[federate]\nrounds = {rounds}\n{federate}\n[evaluate]\nmodels = []\n"
    )
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train": "epochs = 1.7\ngradient_accumulation_steps = 2", "federate": 'regulariser = "fedprox"'},
        {"train": "max_steps = 3\nblocks = [0, -1]", "federate": 'regulariser = "scaffold"'},
        {"federate": 'wire = "int8"\nwire_down = "int4"'},
        {"federate": "validation = 0.25\nalone = true"},
        {"federate": 'space = "frozen-a"\nwire = "bf16"'},
        {"federate": 'space = "product"'},
        {"federate": "participation = 0.6\nquorum = 2", "rounds": 4},
        {"train": 'lora_targets = ["q_proj", "up_proj"]\nepochs = 0.4\ngroup_by_length = false'},
    ],
)
def test_rounds_are_foretold(
    settings: dict[str, Any], tmp_path: Path, tiny_checkpoint: Checkpoint, calibration: Path
) -> None:
    experiment = write(tmp_path, tiny_checkpoint(), calibration, **settings)
    before = set(tmp_path.rglob("*"))
    found = forecast_run(experiment, SPEED)
    assert set(tmp_path.rglob("*")) == before
    run = federate(experiment, tmp_path / "run")
    foretold = {
        (one["round"], name): {what: one[what] for what in ("steps", "tokens", "bytes_up", "bytes_down")}
        for name, client in found["clients"].items()
        for one in client["rounds"]
    }
    done = {
        (record["round"], name): {what: client[what] for what in ("steps", "tokens", "bytes_up", "bytes_down")}
        for record in run.rounds
        for name, client in record["clients"].items()
    }
    assert foretold == done
    rows = {name: client["rows"] for record in run.rounds for name, client in record["clients"].items()}
    assert {name: found["clients"][name]["rows"] for name in rows} == rows
    for what in ("bytes_up", "bytes_down"):
        assert found["bytes"][what.removeprefix("bytes_")] == sum(one[what] for one in done.values())


def test_a_server_that_merges_products_holds_one_and_the_disagreement_on_it(
    tmp_path: Path, tiny_checkpoint: Checkpoint, calibration: Path
) -> None:
    """By hand: a block of the tiny LLM has q and o of 32 x 32, k and v of 16 x 32, and three of 48 x 32."""
    merge = {}
    for space in ("factors", "product"):
        experiment = write(tmp_path, tiny_checkpoint(), calibration, federate=f'space = "{space}"')
        merge[space] = forecast_run(experiment, SPEED)["memory"]["server"]["merge"]["cpu"]
    shapes = [(32, 32)] * 2 + [(16, 32)] * 2 + [(48, 32)] * 3
    product, factors = (
        3 * sum(each(m, n) for m, n in shapes) for each in (lambda m, n: m * n, lambda m, n: 2 * (m + n))
    )
    assert merge["product"] - merge["factors"] == (4 + 1) * (product - factors)


def test_top_k_sends_at_most_what_is_foretold(tmp_path: Path, tiny_checkpoint: Checkpoint, calibration: Path) -> None:
    federated = 'wire = "top-k"\nwire_options = { share = 0.3, values = "int4" }'
    experiment = write(tmp_path, tiny_checkpoint(), calibration, federate=federated)
    found, run = forecast_run(experiment, SPEED), federate(experiment, tmp_path / "run")
    for record in run.rounds:
        for name, client in record["clients"].items():
            most = found["clients"][name]["rounds"][record["round"] - 1]["bytes_up"]
            assert most / 2 <= client["bytes_up"] <= most


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
def test_the_proxy_is_foretold(family: str, tmp_path: Path, tiny_checkpoint: Checkpoint, calibration: Path) -> None:
    llm = tiny_checkpoint(family)
    experiment = write(tmp_path, llm, calibration)
    found, run = forecast_run(experiment, SPEED), federate(experiment, tmp_path / "run")
    sheet = Manifest.read(run.path / "proxy").settings["exposure"]
    assert found["proxy"] == {
        "blocks": 3,
        "parameters": sheet["parameters"],
        "bytes": sheet["bytes"],
        "exposed": pytest.approx(sheet["share"], rel=1e-12),
    }
    [one] = [one for one in found["clients"]["places"]["rounds"] if one["round"] == 2]
    entries = one["bytes_up"] // 4
    by_hand = training(one["tokens"], matrices(run.path / "proxy"), trained=[0, 1, 2], parameters=entries)
    assert one["flops"] == by_hand
    tensors = len(list(federate_tensors(run.path)))
    conflict = one["bytes_down"] - one["bytes_up"]
    assert packed_bytes(entries, 2) <= conflict < packed_bytes(entries, 2) + tensors


@pytest.mark.parametrize("alone", [False, True])
def test_scoring_is_foretold(alone: bool, tmp_path: Path, tiny_checkpoint: Checkpoint, calibration: Path) -> None:
    """By hand: "places" scores 2 of its 9 rows. The tokenizer makes a token a byte, and the text ends with one more."""
    federated = f"validation = 0.25\nalone = {str(alone).lower()}"
    experiment = write(tmp_path, tiny_checkpoint(), calibration, federate=federated)
    found, run = forecast_run(experiment, SPEED), federate(experiment, tmp_path / "run")
    held = client_rows(read_experiment(experiment)).held["places"]
    tokens = sum(min(48, len(row["prompt"]) + len(row["completion"]) + 1) for row in held)
    [first, second] = found["clients"]["places"]["rounds"]
    matrix, adapter = matrices(run.path / "proxy").total, first["bytes_up"] // 4
    of_one = 2 * (matrix + adapter) * tokens
    trained = first["flops"] if alone else 0
    assert first["scoring_flops"] == (2 + alone) * of_one + 2 * matrix * tokens + trained
    assert second["scoring_flops"] == (2 + alone) * of_one + (second["flops"] if alone else 0)
    assert [found["clients"][name]["scored"] for name in CLIENTS] == [1, 1, 2]
    clients = found["clients"].values()
    assert found["flops"]["scoring"] == math.fsum(client["scoring_flops"] for client in clients)
    slowest = [max(c["rounds"][i]["flops"] + c["rounds"][i]["scoring_flops"] for c in clients) for i in range(2)]
    assert found["flops"]["slowest_clients"] == sum(slowest)
    whole = matrices(tiny_checkpoint()).total
    every = sum(
        min(48, len(row["prompt"]) + len(row["completion"]) + 1)
        for rows in client_rows(read_experiment(experiment)).held.values()
        for row in rows
    )
    assert found["flops"]["evaluate"] == 2 * (2 * whole + adapter) * every  # the LLM before tuning, and after
    scored = [record["clients"]["places"]["validation"]["global"]["rows"] for record in run.rounds]
    assert scored == [2, 2]


def test_who_keeps_no_row_back_scores_nothing(tmp_path: Path, tiny_checkpoint: Checkpoint, calibration: Path) -> None:
    """Of a single row none is kept back: this client gives no scores, gets none to score, and trains not alone."""
    experiment = write(tmp_path, tiny_checkpoint(), calibration, federate="validation = 0.25\nalone = true")
    (tmp_path / "numbers.jsonl").write_text('{"prompt": "say", "completion": " one"}')
    found, run = forecast_run(experiment, SPEED), federate(experiment, tmp_path / "run")
    rounds = found["clients"]["numbers"]["rounds"]
    assert [one["scoring_flops"] for one in rounds] == [0.0, 0.0]
    done = [record["clients"]["numbers"]["bytes_down"] for record in run.rounds]
    assert [one["bytes_down"] for one in rounds] == done
    assert found["clients"]["numbers"]["scored"] == 0


def federate_tensors(run: Path) -> list[str]:
    from fedproxy.tensor_files import read_header

    return list(read_header(run / "adapter" / "adapter_model.safetensors").entries)


def test_rows_as_they_are_trained_on(tmp_path: Path, tiny_checkpoint: Checkpoint, calibration: Path) -> None:
    """The tokenizer makes a token a byte: prompts of 14 + 5 i bytes, answers of i + 1 and the end of text."""
    experiment = write(tmp_path, tiny_checkpoint(), calibration)
    client = forecast_run(experiment, SPEED)["clients"]["colours"]
    prompts, answers = [len(f"say colours {i}:") + 5 * i for i in range(7)], [len(" c") + i + 1 for i in range(7)]
    assert client["prompt"] == {"mean": sum(prompts) / 7, "max": max(prompts)}
    assert client["answer"] == {"mean": sum(answers) / 7, "max": max(answers)}
    assert client["cut"] == sum(prompt + answer > 48 for prompt, answer in zip(prompts, answers, strict=True)) > 0
    assert (client["lost"], client["longest"]) == (0, min(48, max(map(sum, zip(prompts, answers, strict=True)))))
    assert client["example"] == {"prompt": "say colours 0:", "answer": " c</s>"}


def test_times_are_operations_over_speed(tmp_path: Path, tiny_checkpoint: Checkpoint, calibration: Path) -> None:
    found = forecast_run(write(tmp_path, tiny_checkpoint(), calibration), given_speed(0.5))
    assert found["speed"]["flops"] == 5e11
    assert {stage: count / 5e11 for stage, count in found["flops"].items()} == found["seconds"]
    assert found["flops"]["clients"] == math.fsum(client["flops"] for client in found["clients"].values())
    most = [max(client["rounds"][i]["flops"] for client in found["clients"].values()) for i in range(2)]
    assert found["flops"]["slowest_clients"] == sum(most)


def test_a_speed_is_measured() -> None:
    from fedproxy.config import Train

    assert measure_speed(Train(precision="fp32")).flops > 1e8


def test_no_weights_are_needed_but_a_configuration_and_a_tokenizer_are(
    tmp_path: Path, tiny_checkpoint: Checkpoint, calibration: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny_checkpoint() / "config.json").read_bytes())
    experiment = write(tmp_path, bare, calibration)
    with pytest.raises(ArtifactError, match="no tokenizer"):
        forecast_run(experiment, SPEED)
    make_tokenizer().save_pretrained(bare)
    whole = forecast_run(write(tmp_path, tiny_checkpoint(), calibration), SPEED)
    assert forecast_run(write(tmp_path, bare, calibration), SPEED) | {"llm": 0} == whole | {"llm": 0}
    (bare / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"config\.json is missing"):
        forecast_run(experiment, SPEED)


def test_what_does_not_fit_is_refused(tmp_path: Path, tiny_checkpoint: Checkpoint, calibration: Path) -> None:
    with pytest.raises(UsageError, match="blocks"):
        forecast_run(write(tmp_path, tiny_checkpoint(), calibration, train="blocks = [7]"), SPEED)
    with pytest.raises(UsageError, match="no linear layer"):
        forecast_run(write(tmp_path, tiny_checkpoint(), calibration, train='lora_targets = "qkv"'), SPEED)


def test_few_steps_for_what_the_proxy_lacks_are_warned_of(tmp_path: Path) -> None:
    # Steps × learning rate × α/r, with α/r = 2: colours 0.16, numbers 0.08; a proxy that lacks half is to have 0.1.
    (tmp_path / "text").write_text("text")
    (tmp_path / "experiment.toml").write_text(
        '[llm]\npath = "x"\n[[client]]\nname = "colours"\ndata = "c"\n[[client]]\nname = "numbers"\ndata = "n"\n'
        '[train]\nlearning_rate = 1e-3\nlora_r = 16\nlora_alpha = 32\n[compress]\ncalibration = "text"\n'
    )
    experiment, steps = load_experiment(tmp_path / "experiment.toml", remote=True), {"colours": 80, "numbers": 40}
    [warning] = few_steps(experiment, 0.5, steps)
    assert "1 of 2 clients" in warning
    assert "numbers takes 40" in warning
    assert "1.2 times" in warning
    assert few_steps(experiment, 0.39, steps) == []
    assert len(few_steps(experiment, 0.9, steps)) == 1
    assert few_steps(experiment, 0.9, {"colours": 0, "numbers": 1000}) == []  # one is never asked
    assert few_steps(replace(experiment, heal=Heal(steps=10)), 0.5, steps) == [warning]


def test_noise_that_is_longer_than_the_gradients_is_warned_of() -> None:
    [warning] = loud_noise({"colours": 0.9, "numbers": 1.1, "sounds": 18.6})
    assert "2 of 3 clients" in warning
    assert "sounds the noise is 18.6 times" in warning
    assert loud_noise({"colours": 0.9}) == loud_noise({}) == []
