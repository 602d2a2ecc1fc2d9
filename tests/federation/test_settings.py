import pytest
import torch

from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.aggregation.space import SPACES
from fedproxy.config import Federate
from fedproxy.errors import FederationError, UsageError
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.secure.form import threshold
from fedproxy.federation.settings import check_client_privacy, check_roster, check_settings
from fedproxy.federation.wire import ENCODINGS


def test_the_defaults_go_together():
    check_settings(Federate())


@pytest.mark.parametrize("space", [name for name, row in SPACES.items() if row.lasting])
@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_where_factors_are_merged_every_regulariser_has_a_meaning(space, regulariser):
    check_settings(Federate(space=space, regulariser=regulariser))


@pytest.mark.parametrize("wire", ENCODINGS)
def test_every_encoding_goes_up_and_those_that_send_all_values_down(wire):
    check_settings(Federate(wire=wire))
    if ENCODINGS[wire].by_share:
        with pytest.raises(UsageError, match=wire):
            check_settings(Federate(wire_down=wire))
    else:
        check_settings(Federate(wire_down=wire))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"space": "product", "regulariser": "scaffold"}, '"scaffold".*"product".*fedprox.*factors, frozen-a'),
        ({"space": "product", "regulariser": "none", "wire_down": "int8"}, 'wire_down = "int8".*"product".*fp32'),
        ({"wire": "int4", "wire_options": {"blok": 64}}, "blok.*block"),
        ({"wire": "int3"}, "wire = 'int3'"),
        ({"merge_options": {"row": 1.1}}, "rho"),
        ({"server_options": {"momentum": 0.9}}, "Unknown option of the server optimizer none"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, says):
    with pytest.raises(UsageError, match=says):
        check_settings(Federate(**settings))


def opens(federate, names):
    """Whether a round of these clients begins, if all are there, and no client may be asked to share with too few."""
    try:
        server = Coordinator(names, {"w": torch.zeros(1)}, federate)
        server.begin(names)
    except (FederationError, UsageError):
        return False
    return not federate.secure or (len(server.asked) > 2 and threshold(len(server.asked)) <= len(server.asked))


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 20, 255, 256, 300])
def test_clients_are_refused_where_not_even_all_of_them_hold_a_round(secure, count):
    """Whatever share a round asks, and whatever quorum it needs."""
    names = [f"{number:03}" for number in range(count)]
    for participation in (0.01, 0.3, 0.85, 0.86, 1.0):
        for quorum in (1, 2, 3, 255, 256, 0.1, 2 / 3, 1.0):
            settings = {"merge": "mean", "regulariser": "none", "participation": participation, "quorum": quorum}
            federate = Federate(secure=secure, **settings)
            try:
                check_settings(federate, names)
                held = True
            except UsageError:
                held = False
            assert held == opens(federate, names), settings


@pytest.mark.parametrize(
    ("settings", "count", "says"),
    [
        ({"secure": True}, 1, "secure = true: .* needs 3 clients, and the number of clients is 1"),
        ({"secure": True, "quorum": 1}, 2, "secure = true: .* needs 3 clients, and the number of clients is 2"),
        ({"quorum": 3}, 2, "quorum = 3: .* is 2"),
        ({"secure": True}, 256, "participation = 1: .* 256 clients, and with secure = true 255 are the most"),
        ({"secure": True, "quorum": 256}, 0, "quorum = 256 .* 255"),
        ({"privacy": {"epsilon": 8.0, "delta": 0.05, "clip": 1.0}}, 20, "delta = 0.05: of 20 clients .* 1 in 20"),
        (
            {"privacy": {"epsilon": 0.01, "delta": 1e-30, "clip": 1.0}},
            0,
            r"\[federate.privacy\] No noise makes 10 steps",
        ),
    ],
)
def test_what_no_round_can_come_of_is_refused_with_setting_and_number(settings, count, says):
    federate = Federate(merge="mean", merge_options={"weights": "uniform"}, regulariser="none", **settings)
    with pytest.raises(UsageError, match=says):
        check_settings(federate, [f"{number:03}" for number in range(count)])


def test_one_client_fewer_than_the_delta_names_is_taken():
    budget = {"epsilon": 8.0, "delta": 0.05, "clip": 1.0}
    federate = Federate(merge="mean", merge_options={"weights": "uniform"}, regulariser="none", privacy=budget)
    check_client_privacy(federate)
    check_roster(federate, "abcdefghijklmnopqrs")
