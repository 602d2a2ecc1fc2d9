"""Contrast of the pages' colours, as WCAG 2 has it: text 4.5, marks of figures 3."""

import re
from importlib.resources import files

import pytest

from fedproxy.reporting.heat_maps import STRONGEST

STYLE = files("fedproxy.reporting").joinpath("templates", "style.css").read_text()
LIGHT, DARK = (dict(re.findall(r"--(\w+): #([0-9a-f]{6})", part)) for part in STYLE.split("prefers-color-scheme: dark"))
TEXT = ["ink", "quiet", "link"]


def channels(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def luminance(rgb: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: list[float], second: list[float]) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_hand():
    assert contrast(channels("ffffff"), channels("000000")) == pytest.approx(21)
    assert contrast(channels("767676"), channels("ffffff")) == pytest.approx(4.54, abs=0.01)


def test_every_colour_of_text_is_looked_at():
    used = set(re.findall(r"[^-]color: var\(--(\w+)\)", STYLE))
    assert used == set(TEXT)
    assert set(re.findall(r"background: var\(--(\w+)\)", STYLE)) == {"page", "tint"}


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["page", "tint"])
@pytest.mark.parametrize("text", TEXT)
def test_text_on_its_ground(theme, ground, text):
    assert contrast(channels(theme[text]), channels(theme[ground])) >= 4.5


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_numbers_in_the_strongest_shade_of_a_heat_map(theme):
    for series in ("series0", "series1"):
        pairs = zip(channels(theme[series]), channels(theme["page"]), strict=True)
        ground = [STRONGEST * shade + (1 - STRONGEST) * page for shade, page in pairs]
        assert contrast(channels(theme["ink"]), ground) >= 4.5


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_and_marks(theme):
    for number in range(6):
        assert contrast(channels(theme[f"series{number}"]), channels(theme["page"])) >= 3
