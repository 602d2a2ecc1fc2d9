"""What keeps clients together while they train. To add one: a file here that ends in a `Regulariser`, and its row."""

from fedproxy.aggregation.regularise.contract import Carried, Regulariser, Trained
from fedproxy.aggregation.regularise.fedprox import FEDPROX
from fedproxy.aggregation.regularise.none import NONE
from fedproxy.aggregation.regularise.pcr import PCR
from fedproxy.aggregation.regularise.scaffold import SCAFFOLD
from fedproxy.registry import Axis

__all__ = ["REGULARISERS", "Carried", "Regulariser", "Trained"]

REGULARISERS: Axis[Regulariser] = Axis(
    "regulariser", "fedproxy.regularisers", Regulariser, {row.name: row for row in (NONE, FEDPROX, PCR, SCAFFOLD)}
)
