"""What goes with secure sums, how many clients make one, and what they must have been told alike."""

import dataclasses
import math

import pytest
import torch

from fedproxy.config import Federate
from fedproxy.errors import UsageError
from fedproxy.federation.messages import Ask
from fedproxy.federation.secure.form import BOUND, POSITIVE, VALUES, Form, check_secure, terms, threshold
from fedproxy.federation.settings import check_settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"merge": "median"}, ['merge = "median"', "h-ties", "mean"]),
        ({"merge": "ties"}, ['merge = "ties"', "h-ties", "mean"]),
        ({"merge": "trimmed-mean"}, ['merge = "trimmed-mean"']),
        ({"merge_options": {"clip_norm": 1.0}}, ["merge_options.clip_norm", "max_norm"]),
        ({"merge_options": {"r0": 0.5}}, ["merge_options.r0", "trimmed"]),
        ({"merge_options": {"delta": 0.1}}, ["merge_options.delta", "trimmed"]),
        ({"space": "product", "regulariser": "none"}, ['space = "product"', "factors", "frozen-a"]),
        ({"regulariser": "scaffold"}, ['regulariser = "scaffold"']),
        ({"wire": "int4"}, ['wire = "int4"', "fp32"]),
        ({"wire": "top-k"}, ['wire = "top-k"', "fp32"]),
        ({"merge": "median", "wire": "int8"}, ['merge = "median"', 'wire = "int8"']),
    ],
)
def test_what_needs_single_updates_is_refused_by_key_and_value(settings, says):
    check_settings(Federate(**settings))  # without secure sums it is fine
    with pytest.raises(UsageError) as refused:
        check_settings(Federate(secure=True, **settings))
    assert all(part in str(refused.value) for part in ["[federate] secure = true", *says])


@pytest.mark.parametrize("settings", [{}, {"merge": "mean"}, {"wire_down": "int8"}, {"space": "frozen-a"}])
def test_what_goes_with_them_is_taken(settings):
    check_settings(Federate(secure=True, **settings))
    check_secure(Federate(**settings))


def test_the_form_by_hand():
    form = Form.of(Federate(secure=True))
    assert form == Form(True, 1.1, False, True, BOUND)
    assert (form.labels, [form.words(label, 7) for label in form.labels]) == ((VALUES, POSITIVE), [14, 7])
    mean = Federate(secure=True, merge="mean", regulariser="none", max_norm=2.0)
    assert Form.of(mean) == Form(False, 1.0, True, False, 2.0)
    assert (Form.of(mean).labels, Form.of(mean).words(VALUES, 7)) == ((VALUES,), 7)
    uniform = dataclasses.replace(mean, merge_options={"weights": "uniform"}, regulariser="pcr", max_norm=None)
    assert Form.of(uniform) == Form(False, 1.0, False, True, BOUND)
    assert Form.of(Federate(secure=True, merge_options={"rho": 2.0})).rho == 2.0


@pytest.mark.parametrize("members", range(3, 256))
def test_a_sum_needs_two_thirds_and_more_than_a_half(members):
    needed = threshold(members)
    assert needed == math.ceil(members * 2 / 3)
    assert members / 2 < needed <= members


def test_what_all_must_be_told_alike():
    ask = Ask("mask", label="values", counts=torch.zeros(3, dtype=torch.uint32), top=2.0)
    alike = [dataclasses.replace(ask, letters={"x": b"1"}), dataclasses.replace(ask, threshold=3)]
    assert {terms(one) for one in alike} == {terms(ask)}
    others = [{"top": 3.0}, {"usual": 0.5}, {"counts": torch.ones(3, dtype=torch.uint32)}, {"counts": None}]
    assert len({terms(ask), *(terms(dataclasses.replace(ask, **one)) for one in others)}) == 5
