"""No regulariser: every client goes its own way."""

from fedproxy.aggregation.regularise.contract import Regulariser

NONE = Regulariser("none")
