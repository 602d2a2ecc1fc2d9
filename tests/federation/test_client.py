import pytest
import torch

from fedproxy.aggregation.regularise import PENALTIES
from fedproxy.config import Federate
from fedproxy.federation.client import STRENGTH, regularisation
from fedproxy.federation.messages import Order

CPU = torch.device("cpu")
PHI = {"w": torch.tensor([1.0, 2.0])}
MOVED = {"w": torch.tensor([2.0, 5.0])}
FIRST = Order(1, PHI, None)
LATER = Order(2, PHI, {"w": torch.tensor([1.0, 0.5])})


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        (Federate(regulariser="none", regulariser_strength=1.0), LATER),
        (Federate(regulariser="pcr"), FIRST),
        (Federate(regulariser="fedprox", regulariser_strength=0.0), LATER),
    ],
)
def test_a_term_that_is_zero_throughout_is_not_computed(settings, order):
    assert regularisation(settings, order, CPU) is None


def test_pcr_weighs_the_squared_distance_by_the_conflict():
    term = regularisation(Federate(regulariser="pcr", regulariser_strength=0.1), LATER, CPU)
    assert float(term(MOVED)) == pytest.approx(0.1 * (1.0 * 1 + 0.5 * 9))


def test_fedprox_is_half_the_squared_distance():
    term = regularisation(Federate(regulariser="fedprox", regulariser_strength=0.1), FIRST, CPU)
    assert float(term(MOVED)) == pytest.approx(0.05 * (1 + 9))


def test_every_regulariser_has_a_default_strength():
    assert STRENGTH.keys() == PENALTIES.keys() - {"none"}
    assert STRENGTH["pcr"] == 1e-5
