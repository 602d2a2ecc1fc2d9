"""The job in memory, run as its page shows it."""

import torch
from peft import PeftModel

from tests.docs.terminal import DOCS, fenced

PAGE = DOCS / "how_to" / "in_memory.md"


def test_the_job_in_memory_runs_as_written(tiny_checkpoint, tmp_path, monkeypatch):
    (block,) = [text for language, text in fenced(PAGE) if language == "python"]
    (tmp_path / "llm").symlink_to(tiny_checkpoint())
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block, PAGE.name, "exec"), names)
    tuned, adapter, proxy = names["tuned"], names["adapter"], names["proxy"]
    assert isinstance(tuned, PeftModel)
    assert tuned.get_base_model() is names["llm"]
    blocks = {int(name.split(".layers.")[1].split(".")[0]) for name, _ in tuned.named_parameters() if "lora_B" in name}
    assert sorted(blocks) == proxy.layer_map
    assert any(bool(torch.any(tensor)) for name, tensor in adapter.items() if "lora_B" in name)
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]
