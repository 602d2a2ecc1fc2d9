"""Spaces in which adapters are merged. To add one: a file here that ends in a `Space`, and its row in `SPACES`."""

from fedproxy.aggregation.space.contract import Space, trained
from fedproxy.aggregation.space.factors import FACTORS
from fedproxy.aggregation.space.frozen_a import FROZEN_A
from fedproxy.aggregation.space.product import PRODUCT
from fedproxy.registry import Axis

__all__ = ["SPACES", "Space", "trained"]

SPACES: Axis[Space] = Axis("space", "fedproxy.spaces", Space, {row.name: row for row in (FACTORS, FROZEN_A, PRODUCT)})
