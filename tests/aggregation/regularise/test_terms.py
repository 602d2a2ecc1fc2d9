import pytest
import torch

from fedproxy.aggregation.regularise import REGULARISERS

CPU = torch.device("cpu")
PHI = {"w": torch.tensor([1.0, 2.0])}
MOVED = {"w": torch.tensor([2.0, 5.0])}
CONFLICT = {"w": torch.tensor([1.0, 0.5])}


@pytest.mark.parametrize(
    ("name", "conflict", "strength"), [("none", CONFLICT, 1.0), ("pcr", None, None), ("fedprox", CONFLICT, 0.0)]
)
def test_a_term_that_is_zero_throughout_is_not_computed(name, conflict, strength):
    assert REGULARISERS[name].term(PHI, conflict, strength, CPU) is None


def test_pcr_weighs_the_squared_distance_by_the_conflict():
    assert float(REGULARISERS["pcr"].term(PHI, CONFLICT, 0.1, CPU)(MOVED)) == pytest.approx(0.1 * (1.0 * 1 + 0.5 * 9))


def test_fedprox_is_half_the_squared_distance():
    assert float(REGULARISERS["fedprox"].term(PHI, None, 0.1, CPU)(MOVED)) == pytest.approx(0.05 * (1 + 9))


def test_a_regulariser_has_its_published_strength_unless_one_is_given():
    assert float(REGULARISERS["fedprox"].term(PHI, None, None, CPU)(MOVED)) == pytest.approx(0.01 / 2 * (1 + 9))
    assert float(REGULARISERS["pcr"].term(PHI, CONFLICT, None, CPU)(MOVED)) == pytest.approx(1e-5 * (1 + 4.5))
