from dataclasses import dataclass
from typing import Literal

import pytest

from fedproxy.errors import UsageError
from fedproxy.registry import build


@dataclass(frozen=True)
class Sample:
    block: Literal[32, 64] = 32
    share: float = 0.5


def test_a_whole_number_may_come_as_a_float_and_stays_whole():
    built = build("sample", "s", Sample, {"block": 64.0, "share": 1})
    assert (type(built.block), built.block, type(built.share)) == (int, 64, float)


def test_what_is_no_choice_is_refused():
    with pytest.raises(UsageError, match=r"block.*48.*32, 64"):
        build("sample", "s", Sample, {"block": 48})
    with pytest.raises(UsageError, match=r"Did you mean 'block'\?"):
        build("sample", "s", Sample, {"blok": 32})
