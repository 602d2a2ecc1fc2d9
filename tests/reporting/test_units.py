import pytest

from fedproxy.reporting.units import count, duration, percent, points, size


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (26_214_400, "26.2 MB"), (3e12, "3.0 TB")],
)
def test_size(number, text):
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.04, "0.0 s"),
        (9.9, "9.9 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (192, "3 min 12 s"),
        (7320, "2 h 02 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_the_rest():
    assert (percent(None), percent(0.8749), points(-0.015), points(0.1)) == ("–", "87.5", "−1.5 points", "+10.0 points")
    assert (count(1, "row"), count(0, "row"), count(1200, "row")) == ("1 row", "0 rows", "1,200 rows")
