"""The how-to about TRL as a reader follows it; TRL is in no environment of the package's, so that it may be missing."""

import json
from pathlib import Path

import pytest

import fedproxy
from tests.docs.terminal import DOCS, Block, fenced, follow

pytest.importorskip("trl")
PAGE = DOCS / "how_to" / "trl_on_the_proxy.md"


@pytest.mark.long
def test_every_block_runs_and_the_bank_gains(tmp_path: Path) -> None:
    blocks = [
        Block(text if language == "sh" else f"python - <<'END OF PROGRAM'\n{text}END OF PROGRAM")
        for language, text in fenced(PAGE)
    ]
    assert len(blocks) == 5
    tasks = Path(fedproxy.__file__).parent / "demo" / "tasks"
    score = f"fedproxy evaluate {{}} --tasks demo_banking --include {tasks} --json > {{}}.json"
    blocks += [Block(score.format(model, model)) for model in ("my-llm", "tuned")]
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(fedproxy.__file__).parents[1])}
    with follow(blocks, tmp_path, instead={"num_train_epochs=2": "max_steps=12"}, settings=settings):
        llm, tuned = (json.loads((tmp_path / f"{model}.json").read_text())["average"] for model in ("my-llm", "tuned"))
    assert tuned > llm + 0.1
    assert not (tmp_path / "my-adapter" / "fedproxy.json").exists()
