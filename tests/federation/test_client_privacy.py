import math
from dataclasses import replace

import dp_accounting
import pytest
import torch
from dp_accounting import pld

from fedproxy.config import ClientPrivacy, Federate
from fedproxy.errors import ConfigError, UsageError
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.messages import Reply
from fedproxy.federation.settings import check_client_privacy
from fedproxy.privacy.client_noise import ClientNoise
from tests.federation.secure import party
from tests.federation.secure.party import NAMES, Party, flat

UNIFORM = {"weights": "uniform"}
BUDGET = {"epsilon": 3.0, "delta": 1e-4, "clip": 2.0}
MANY = {"a": torch.zeros(100, 100), "b": torch.zeros(10_000)}


def table(**settings) -> Federate:
    return Federate(
        **{"merge": "mean", "merge_options": UNIFORM, "regulariser": "none", "quorum": 0.5, "rounds": 4, **settings}
    )


def merged(updates, settings):
    """What a round without secure sums adds to an adapter of zeros, flat."""
    server = Coordinator(updates, MANY, settings)
    server.begin(updates)
    for name, update in updates.items():
        said = Reply(name, 1, update, rows=10, tokens=50, steps=2, loss=1.0, seconds=3.0)
        assert server.receive(name, said) is None
    closed = server.close()
    return flat(closed.adapter), closed


def test_the_noise_is_the_least_that_the_budget_allows_over_all_rounds():
    noise = ClientNoise.of(table(privacy=BUDGET))
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.GaussianDpEvent(noise.multiplier), 4)
    assert accountant.get_epsilon(1e-4) == pytest.approx(3.0, rel=1e-2)
    spent = [noise.spent(rounds) for rounds in (1, 2, 3, 4)]
    assert spent == sorted(spent)
    assert spent[0] < spent[-1] <= 3.0 * 1.001


def test_the_server_adds_the_noise_of_the_sum_to_the_mean():
    settings = table(privacy=BUDGET)
    found, closed = merged(dict.fromkeys(NAMES, MANY), settings)
    noise = ClientNoise.of(settings)
    assert float(found.std()) == pytest.approx(noise.multiplier * 2.0 / len(NAMES), rel=0.05)
    assert abs(float(found.mean())) < 5 * noise.deviation() / len(NAMES) / math.sqrt(20_000)
    assert closed.record["privacy"]["epsilon"] == noise.spent(1)
    assert not torch.equal(found, merged(dict.fromkeys(NAMES, MANY), settings)[0])


def test_no_client_moves_the_mean_by_more_than_the_clip():
    settings = table(privacy={**BUDGET, "epsilon": 100.0})
    loud = {key: torch.full_like(tensor, 1.0) for key, tensor in MANY.items()}
    updates = dict.fromkeys(NAMES, MANY) | {"v": loud}
    found, _ = merged(updates, settings)
    direction = flat(loud) / flat(loud).norm()
    scatter = ClientNoise.of(settings).deviation() / len(NAMES)
    assert float(found @ direction) == pytest.approx(2.0 / len(NAMES), abs=5 * scatter)


@pytest.mark.parametrize("gone", [{}, {"z": ("mask", "values")}])
def test_under_secure_sums_the_clients_add_it_and_never_less(tmp_path, monkeypatch, gone):
    monkeypatch.setattr(party, "PHI", MANY)
    federation = Party(
        tmp_path, make=lambda name, number: MANY, merge_options=UNIFORM, privacy=ClientPrivacy(**BUDGET), rounds=4
    )
    found = flat(federation.round(gone=gone).adapter)
    assert federation.faults == []
    there, needed = len(NAMES) - len(gone), 4  # two thirds of five
    whole = ClientNoise.of(federation.settings).deviation() * math.sqrt(there / needed)
    assert float(found.std()) == pytest.approx(whole / there, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"merge": "h-ties", "merge_options": {}}, "h-ties.*mean"),
        ({"merge_options": {}}, "uniform"),
        ({"regulariser": "pcr"}, "pcr"),
        ({"regulariser": "scaffold"}, "scaffold"),
        ({"space": "product"}, "product"),
        ({"validation": 0.1}, "validation"),
        ({"max_norm": 1.0}, "max_norm"),
        ({"merge_options": {**UNIFORM, "clip_norm": 1.0}}, "clip_norm"),
    ],
)
def test_what_the_budget_does_not_cover_is_refused_by_name(settings, says):
    check_client_privacy(table(privacy=BUDGET))
    with pytest.raises(UsageError, match=says):
        check_client_privacy(table(privacy=BUDGET, **settings))
    check_client_privacy(replace(table(**settings), privacy=None))


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"delta": 0.5}, {"clip": 0.0}, {"sigma": 1.0}])
def test_a_budget_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        table(privacy={**BUDGET, **wrong})
