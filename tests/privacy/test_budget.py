import json
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.errors import ArtifactError
from fedproxy.privacy.accounting import Steps, default_delta, epsilon_of
from fedproxy.privacy.budget import Budget
from fedproxy.privacy.releases import OverspentError
from tests.crashes import moments

ROWS = [{"prompt": f"case {number}:", "completion": " kept"} for number in range(50)]
COST = Steps(0.5, 4.0, 1)


def test_what_was_spent_is_known_to_the_next_run(tmp_path):
    Budget(tmp_path, ROWS, 9.0).spend(COST)
    Budget(tmp_path, ROWS, 9.0).spend(COST)
    assert Budget(tmp_path, ROWS, 9.0).spent == epsilon_of([COST, COST], default_delta(50))


def test_costs_of_two_kinds_add_up(tmp_path):
    other = Steps(0.1, 2.0, 5)
    for cost in (COST, other, COST):
        Budget(tmp_path, ROWS, 9.0).spend(cost)
    assert Budget(tmp_path, ROWS, 9.0).spent == epsilon_of([COST, COST, other], default_delta(50))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(list(reversed(ROWS)), id="in another order"),
        pytest.param(ROWS[:-1], id="without one"),
        pytest.param([*ROWS, {"text": "new"}], id="with one more"),
        pytest.param([{"completion": row["completion"], "prompt": row["prompt"]} for row in ROWS], id="turned"),
        pytest.param([ROWS[7], *({"text": str(n)} for n in range(49))], id="with one in common"),
    ],
)
def test_rows_that_meet_others_bear_their_cost(tmp_path, rows):
    Budget(tmp_path, ROWS, 9.0).spend(COST)
    assert Budget(tmp_path, rows, 9.0).spent == pytest.approx(epsilon_of([COST], default_delta(len(rows))))


def test_other_rows_have_a_budget_of_their_own(tmp_path):
    Budget(tmp_path, ROWS[:25], 9.0).spend(COST)
    assert Budget(tmp_path, ROWS[25:], 9.0).spent == 0


def test_what_would_go_beyond_is_refused_and_costs_nothing(tmp_path):
    delta = default_delta(50)
    most = (epsilon_of([COST], delta) + epsilon_of([COST] * 2, delta)) / 2
    purse = Budget(tmp_path, ROWS, most)
    purse.check(COST)
    purse.spend(COST)
    for refused in (purse.check, purse.spend):
        with pytest.raises(OverspentError, match=r"this client allows .* over all runs \(max_epsilon\)"):
            refused(COST)
    assert Budget(tmp_path, ROWS, most).spent == epsilon_of([COST], delta) <= most
    with pytest.raises(OverspentError):
        purse.check(Steps(0.5, 0.0, 1))


@pytest.mark.parametrize("spent", [0, 1])
def test_a_kill_at_any_moment_loses_no_cost(tmp_path, spent):
    """Afterwards the cost is noted, or the killed process had not come to give anything away."""
    folder, kept = tmp_path / "budget", tmp_path / "kept"
    folder.mkdir()
    for _ in range(spent):
        Budget(folder, ROWS, 9.0).spend(COST)
    copies = moments(lambda: Budget(folder, ROWS, 9.0).spend(COST), folder, kept)
    found = [Budget(copy, ROWS, 9.0).spent for copy in copies]
    before, after = (epsilon_of([COST] * count, default_delta(50)) for count in (spent, spent + 1))
    assert len(found) > 2
    assert found[-1] == after
    assert set(found) == {before, after}
    assert found == sorted(found)


MOST = 0.4
"""Some few times `COST`."""


def _spend(folder):
    try:
        Budget(folder, ROWS, MOST).spend(COST)
    except OverspentError:
        return 0
    return 1


def test_processes_at_the_same_time_spend_it_once(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        spent = sum(pool.map(_spend, [tmp_path] * 12))
    assert 1 < spent < 12
    delta = default_delta(50)
    found = Budget(tmp_path, ROWS, MOST).spent
    assert found == epsilon_of([COST] * spent, delta) <= MOST < epsilon_of([COST] * (spent + 1), delta)


def test_what_is_noted_tells_no_row(tmp_path):
    Budget(tmp_path, ROWS, 9.0).spend(COST)
    for path in tmp_path.iterdir():
        assert b"case" not in path.read_bytes()
    assert os.stat(tmp_path / "key").st_mode & 0o077 == 0
    other = tmp_path / "other"
    Budget(other, ROWS, 9.0).spend(COST)
    names = [{path.name for path in folder.glob("*.rows")} for folder in (tmp_path, other)]
    assert not names[0] & names[1], "the hashes are keyed"


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1}', '{"a": [{"sampling": 0.5}]}', json.dumps({"0" * 64: [{}]})])
def test_damage_is_told_and_nothing_is_trained(tmp_path, content):
    Budget(tmp_path, ROWS, 9.0).spend(COST)
    (tmp_path / "spent.json").write_text(content)
    with pytest.raises(ArtifactError):
        Budget(tmp_path, ROWS, 9.0)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.sampled_from([COST, Steps(0.5, 8.0, 2), Steps(1.0, 20.0, 1)]), max_size=8))
def test_whatever_is_asked_the_budget_holds(tmp_path_factory, costs):
    purse = Budget(tmp_path_factory.mktemp("budget"), ROWS, MOST)
    for cost in costs:
        try:
            purse.spend(cost)
        except OverspentError:
            continue
    assert purse.spent <= MOST
