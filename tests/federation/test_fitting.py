"""What an LLM's configuration and tokenizer tell of an experiment's mistakes is told before a weight is read."""

import json
import shutil

import pytest

from fedproxy.comparison import compare
from fedproxy.deployment.address import Address
from fedproxy.deployment.serving import Listen
from fedproxy.errors import UsageError
from fedproxy.forecast import Speed, forecast_comparison, forecast_run
from fedproxy.pipeline import federate, run
from tests.comparison.conftest import experiment_file
from tests.test_pipeline import write_experiment

__all__ = ["experiment_file"]

MISTAKES = {
    'lora_targets = ["nope_proj"]': "nope_proj",
    "blocks = [7]": r"blocks \[7\]: there are 3 blocks",
    "[heal]\nrealign_steps = 1": "they train all|only the engine inline can",
    "[heal]\nsteps = 1\nspare_ends = true\n[compress]\nkeep_first = 3": "leaves no block of the proxy to heal",
}
CLIENT_PRIVACY = """merge = "mean"
merge_options = { weights = "uniform" }
regulariser = "none"
[federate.privacy]
epsilon = 0.01
delta = 1e-30
clip = 1.0
"""
IMPOSSIBLE = {
    "secure = true\n": r"\[federate\] secure = true: a secure sum needs 3 clients, and the number of clients is 2",
    CLIENT_PRIVACY: r"\[federate.privacy\] No noise makes 10 steps cost",
}
MESSAGES = [{"role": "user", "content": "say red:"}, {"role": "assistant", "content": "red"}]


def listened(experiment, out):
    federate(experiment, out, engine="deployment", listen=Listen(Address("127.0.0.1", 0), None))


def simulated(experiment, out):
    federate(experiment, out, engine="simulation")


def dry(experiment, _out):
    forecast_run(experiment, Speed(1e9, "given"))


@pytest.fixture
def write(tmp_path, tiny_checkpoint, calibration):
    """A function that writes an experiment with a mistake, and an LLM of which there are no weights."""
    llm = tmp_path / "llm"
    shutil.copytree(tiny_checkpoint(), llm, ignore=shutil.ignore_patterns("*.safetensors*"))

    def mistaken(mistake=""):
        path = write_experiment(tmp_path, llm, calibration)
        heal, _, compress = mistake.partition("[compress]\n")
        text = path.read_text().replace("[compress]\n", f"[compress]\n{compress}\n")
        table = "" if heal.startswith("[heal]") else "[train]\n"
        path.write_text(text.replace("[train]\n", f"{table}{heal}\n{'' if table else '[train]'}\n"))
        return path

    return mistaken


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("how", [federate, run, simulated, listened, dry])
def test_what_does_not_fit_the_llm_is_told_first(write, tmp_path, how, mistake):
    with pytest.raises(UsageError, match=MISTAKES[mistake]):
        how(write(mistake), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [federate, run, simulated, listened, dry])
@pytest.mark.parametrize("settings", IMPOSSIBLE)
def test_what_no_round_can_come_of_is_told_first(write, tmp_path, how, settings):
    path = write()
    path.write_text(path.read_text().replace("rounds = 3", "rounds = 10") + settings)
    with pytest.raises(UsageError, match=IMPOSSIBLE[settings]):
        how(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [federate, run, simulated, dry])
def test_a_budget_that_protects_none_of_a_clients_rows_is_told_first(write, tmp_path, how):
    path = write("padding_free = false")
    path.write_text(path.read_text() + "[train.privacy]\nepsilon = 3.0\ndelta = 0.09\n")
    with pytest.raises(UsageError, match=r"(colours|numbers): \[train.privacy\] delta = 0.09: of \d+ rows"):
        how(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [federate, run, simulated, dry])
def test_rows_that_the_tokenizer_cannot_render_are_told_first(write, tmp_path, how):
    path = write()
    (tmp_path / "numbers.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    with pytest.raises(UsageError, match="no chat template"):
        how(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_its_proxy_goes_on_without_the_llm(tmp_path, tiny_checkpoint, calibration):
    shutil.copytree(tiny_checkpoint(), tmp_path / "llm")
    path = write_experiment(tmp_path, tmp_path / "llm", calibration, rounds=1)
    federate(path, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "adapter")
    shutil.rmtree(tmp_path / "out" / "rounds")
    for file in (tmp_path / "llm").iterdir():
        file.unlink()
    federate(path, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "adapter").is_dir()


@pytest.mark.parametrize("mistake", list(MISTAKES)[:2])
def test_a_comparison_tells_first_what_does_not_fit(experiment_file, tmp_path, mistake):
    key, _, value = mistake.partition(" = ")
    variant = f'[[compare.variant]]\nname = "mine"\nmethod = "fedavg"\ntrain = {{ {key} = {value} }}\n'
    path = experiment_file(f'methods = ["zero-shot-proxy"]\nseeds = [0]\n{variant}')
    says = "mine, remove = 0.25: .*" + MISTAKES[mistake].replace("there are 3", "there are 6")
    for how in (compare, lambda path, _out: forecast_comparison(path, Speed(1e9, "given"))):
        with pytest.raises(UsageError, match=says):
            how(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_comparison_tells_first_of_rows_that_cannot_be_rendered(experiment_file, tmp_path):
    path = experiment_file('methods = ["zero-shot-proxy", "fedavg"]\nseeds = [0]\n')
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    path.write_text(path.read_text().replace('task = "shape"', f'data = "{tmp_path / "chat.jsonl"}"'))
    with pytest.raises(UsageError, match="no chat template"):
        compare(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
