"""Nobody gets more than burst and rate, nobody is hindered by another, and memory is bounded."""

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedproxy.deployment.limits import Allowance, Places, neighbourhood


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


STEPS = st.lists(st.tuples(st.floats(0, 20), st.sampled_from("ab"), st.integers(1, 12)), max_size=60)


@given(STEPS, st.integers(1, 10), st.sampled_from([0.25, 1.0, 3.0]))
def test_in_no_time_is_more_taken_than_burst_and_rate(steps, burst, rate):
    clock = Clock()
    allowance = Allowance(burst, rate, clock=clock)
    taken = {"a": [], "b": []}
    for pause, who, amount in steps:
        clock.now += pause
        if allowance.take(who, amount) == 0.0:
            taken[who].append((clock.now, amount))
    for times in taken.values():
        for first in range(len(times)):
            for last in range(first, len(times)):
                seconds = times[last][0] - times[first][0]
                assert sum(amount for _, amount in times[first : last + 1]) <= burst + rate * seconds + 1e-6


@given(STEPS, st.integers(1, 10), st.sampled_from([0.25, 1.0, 3.0]))
def test_what_is_refused_can_be_had_after_the_time_that_is_told_and_not_before(steps, burst, rate):
    clock = Clock()
    allowance = Allowance(burst, rate, clock=clock)
    for pause, who, amount in steps:
        clock.now += pause
        wait = allowance.take(who, amount)
        assert wait == math.inf if amount > burst else wait < math.inf
        if 0.01 < wait < math.inf:
            clock.now += 0.99 * wait
            assert allowance.take(who, amount) > 0.0
            clock.now += 0.02 * wait
            assert allowance.take(who, amount) == 0.0


@given(STEPS)
def test_one_is_served_as_if_there_were_no_other(steps):
    clock = Clock()
    shared, alone = Allowance(5, 0.5, clock=clock), Allowance(5, 0.5, clock=clock)
    for pause, who, amount in steps:
        clock.now += pause
        wait = shared.take(who, amount)
        if who == "a":
            assert alone.take(who, amount) == wait


def test_many_addresses_take_bounded_memory_and_give_the_one_that_stays_nothing():
    clock = Clock()
    allowance = Allowance(2, 0.001, most=100, clock=clock)
    got = 0
    for number in range(50_000):
        allowance.take(f"stranger {number}")
        if number % 50 == 0:
            got += allowance.take("here all the time") == 0.0
        assert len(allowance._buckets) <= 100
    assert got == 2


def test_threads_share_a_bucket():
    allowance, got = Allowance(1000, 0.0001, clock=Clock()), []
    run = [threading.Thread(target=lambda: got.extend(allowance.take("a") for _ in range(400))) for _ in range(4)]
    for thread in run:
        thread.start()
    for thread in run:
        thread.join()
    assert got.count(0.0) == 1000


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=200), st.integers(1, 4))
def test_each_has_so_many_places_and_an_empty_one_takes_no_memory(steps, each):
    places, held = Places(each), {"a": 0, "b": 0, "c": 0}
    for who, comes in steps:
        if comes:
            assert places.enter(who) == (held[who] < each)
            held[who] = min(each, held[who] + 1)
        elif held[who]:
            places.leave(who)
            held[who] -= 1
    for who, count in held.items():
        for _ in range(count):
            places.leave(who)
    assert not places._held


@pytest.mark.parametrize(
    ("address", "counts_as"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_what_counts_as_one_address(address, counts_as):
    assert neighbourhood(address) == counts_as
