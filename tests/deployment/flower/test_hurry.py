import inspect

from flwr.supercore.inflatable import inflatable_utils

from fedproxy.deployment.flower.hurry import FIRST_PAUSE, LONGEST_PAUSE, _default, hurry


def test_only_the_named_defaults_change():
    def positional(a, pause=1.0, cap=10.0, other=3):
        return a, pause, cap, other

    def keyword(a, *, pause=1.0, other=3):
        return a, pause, other

    for function in (positional, keyword):
        _default(function, pause=0.5, unknown=9.0)
    assert positional(0) == (0, 0.5, 10.0, 3)
    assert keyword(0) == (0, 0.5, 3)


def test_flowers_pulls_pause_briefly():
    hurry()
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        parameters = inspect.signature(function).parameters
        assert parameters["initial_backoff"].default == FIRST_PAUSE
        assert parameters["backoff_cap"].default == LONGEST_PAUSE
