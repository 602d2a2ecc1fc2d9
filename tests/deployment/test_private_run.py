"""[train.privacy] between organisations: real processes, each client with a budget of its own."""

import os
import signal
import time
from dataclasses import replace

import pytest

from fedproxy.config import load_experiment
from fedproxy.data import read_rows
from fedproxy.deployment.purse import FOLDER, open_purse
from fedproxy.federation.offer import Limits
from fedproxy.models.training import optimizer_steps
from fedproxy.privacy.budget import Budget
from fedproxy.privacy.plan import Plan
from fedproxy.privacy.releases import OverspentError, Releases
from tests.deployment.conftest import PATIENCE, Federation, eventually
from tests.federation.test_offer import OFFER
from tests.test_private_config import SAFE

ROWS = [{"prompt": f"case {number}:", "completion": " kept"} for number in range(50)]


def offered(**train):
    federate = replace(OFFER.federate, validation=0.0, rounds=3)
    return replace(OFFER, train=replace(SAFE, batch_size=10, **train), federate=federate)


def test_what_is_left_of_a_run_must_be_within_the_budget(tmp_path):
    cache, state = tmp_path / "cache", tmp_path / "state"
    assert open_purse(offered(), Limits(max_epsilon=3.0), ROWS, cache, state).spent == 0
    with pytest.raises(OverspentError, match="this client allows 1 over all runs"):
        open_purse(offered(), Limits(max_epsilon=1.0), ROWS, cache, state)
    assert open_purse(offered(), Limits(max_epsilon=1.0), ROWS, cache, None).spent == 0
    assert open_purse(offered(), Limits(), ROWS, cache, state) is None
    assert open_purse(offered(privacy=None), Limits(max_epsilon=1.0), ROWS, cache, state) is None


@pytest.mark.slow
def test_clients_with_budgets_take_part_as_long_as_these_last(federation, monkeypatch) -> None:
    one: Federation = federation(rounds=2, quorum=3)
    text = one.experiment.read_text().replace("[train]\n", "[train]\npadding_free = false\n")
    one.experiment.write_text(f"{text}[train.privacy]\nepsilon = 8.0\n")
    owner = one.serve("run")
    said = one.join("numbers", "--max-epsilon", 2, cache="poor").ends(4)
    assert "this client allows 2 over all runs (max_epsilon)" in said, said
    clients = {name: one.join(name, "--max-epsilon", 9, cache=name) for name in ("animals", "colours")}
    after_kills = [killed_after(method, one, monkeypatch) for method in ((Budget, "spend"), (Releases, "outcome"))]
    clients["numbers"] = one.join("numbers", "--max-epsilon", 20, cache="numbers", log="back")
    owner.ends()
    for name, client in clients.items():
        assert "of any one of your rows all 2 updates tell at most epsilon = 8" in client.ends()
        spent = [one.record("run", number)["clients"][name]["epsilon"] for number in (1, 2)]
        assert 0 < spent[0] < spent[1] <= 8
        assert one.record("run", 2)["clients"][name]["loss"] is None
        if name != "numbers":
            assert spent_by(one, name) == spent[1]
    assert len(one.events("run", "round_failed")) == 2
    train = load_experiment(one.experiment).train
    plan = Plan.of(train.privacy, train, rows=4, steps=optimizer_steps(4, train), rounds=2)
    assert after_kills == [plan.spent(1), plan.spent(2)]
    assert spent_by(one, "numbers") == plan.spent(3), "the training that was given to nobody has cost as much as one"
    owner = one.serve("again")
    said = one.join("animals", "--max-epsilon", 9, cache="animals", log="again").ends(4)
    assert "these rows have cost" in said, said
    os.kill(owner.pid, signal.SIGTERM)
    owner.ends(130)


def spent_by(one: Federation, name: str) -> float:
    """What a client's budget says that its rows have cost."""
    return Budget(one.folder / name / FOLDER, read_rows(one.folder / f"{name}.jsonl"), 20.0).spent


def killed_after(method: tuple[type, str], one: Federation, monkeypatch: pytest.MonkeyPatch) -> float:
    """Let a client join, kill -9 it when this method of its has done its work; what its budget then says."""
    kind, name = method
    real, mark = getattr(kind, name), one.folder / name

    def stop(*arguments: object) -> None:
        real(*arguments)
        mark.touch()
        time.sleep(PATIENCE)

    with monkeypatch.context() as patch:
        patch.setattr(kind, name, stop)
        client = one.join("numbers", "--max-epsilon", 20, cache="numbers", log=name)
    assert eventually(mark.exists), client.said
    client.kill()
    assert eventually(lambda: not client.family(), 10.0), client.family()
    assert "Sent an update" not in client.said
    return spent_by(one, "numbers")
