"""[train.privacy] between organisations: real processes, each client with a budget of its own."""

import os
import signal
from dataclasses import replace

import pytest

from fedproxy.data import read_rows
from fedproxy.deployment.purse import FOLDER, open_purse
from fedproxy.federation.offer import Limits
from fedproxy.privacy.budget import Budget
from fedproxy.privacy.releases import OverspentError
from tests.deployment.conftest import WORDS, Federation
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
def test_clients_with_budgets_take_part_as_long_as_these_last(federation) -> None:
    one: Federation = federation(rounds=2, quorum=3)
    text = one.experiment.read_text().replace("[train]\n", "[train]\npadding_free = false\n")
    one.experiment.write_text(f"{text}[train.privacy]\nepsilon = 8.0\n")
    owner = one.serve("run")
    said = one.join("numbers", "--max-epsilon", 2, cache="poor").ends(4)
    assert "this client allows 2 over all runs (max_epsilon)" in said, said
    clients = {name: one.join(name, "--max-epsilon", 9, cache=name) for name in WORDS}
    owner.ends()
    for name, client in clients.items():
        assert "of any one of your rows all 2 updates tell at most epsilon = 8" in client.ends()
        spent = [one.record("run", number)["clients"][name]["epsilon"] for number in (1, 2)]
        assert 0 < spent[0] < spent[1] <= 8
        assert one.record("run", 2)["clients"][name]["loss"] is None
        rows = read_rows(one.folder / f"{name}.jsonl")
        assert Budget(one.folder / name / FOLDER, rows, 9.0).spent == spent[1]
    owner = one.serve("again")
    said = one.join("animals", "--max-epsilon", 9, cache="animals", log="again").ends(4)
    assert "these rows have cost" in said, said
    os.kill(owner.pid, signal.SIGTERM)
    owner.ends(130)
