"""Matplotlib figures as inline SVG: text stays text, and every colour is one of the page's CSS variables.

Figures are drawn in stand-in colours, which `inline` replaces by `currentColor` and `var(--…)`: one drawing for
light and dark ground. The same figure gives the same bytes.
"""

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedproxy.errors import MissingExtraError
from fedproxy.foreign import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
INK, GRID = "#010101", "#010102"
COLOURS = [f"#0101{index:02x}" for index in range(16, 22)]
_VARIABLES = {INK: "currentColor", GRID: "var(--grid)"} | {
    colour: f"var(--series{index})" for index, colour in enumerate(COLOURS)
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Set the figures' style for the block, whatever the user's matplotlibrc says.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("The report", "report") from error
    style = Path(__file__).parent / "templates" / "figures.mplstyle"
    with matplotlib.rc_context(fname=style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # The browser brings its own fonts.
        yield


def figure(width: float, height: float, title: str) -> "tuple[Figure, Axes]":
    """A figure of `width` × `height` inches with one plot under a title."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.add_subplot()
    axes.set_title(title)
    return drawn, axes


def label(name: str, length: int = 20) -> str:
    """A name fit for a figure: printable, on one line, cut to `length` characters."""
    return plain(name, length)


def legend_text(name: str, length: int = 20) -> str:
    """A label that matplotlib shows even where the name begins with an underscore."""
    return label(name, length) if not name.startswith("_") else "\u200b" + label(name, length)


def inline(drawn: "Figure", name: str, description: str) -> str:
    """The figure as an SVG element for an HTML page, named by its title and described for who cannot see it.

    Args:
        drawn: The figure.
        name: Unique in the page; the ids of the element's parts begin with it.
        description: What a reader who cannot see it needs to know.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    without = {"Date": None, "Creator": None, "Type": None, "Format": None}
    # `savefig` would draw the figure once more, to no end.
    FigureCanvasSVG(drawn).print_svg(buffer, metadata=without)  # type: ignore[no-untyped-call]
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = text[re.search(r"<svg[^>]*>", text).end() :]  # type: ignore[union-attr]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    text = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], text)
    width, height = (round(72 * inches, 1) for inches in drawn.get_size_inches())
    title = html.escape(drawn.axes[0].get_title("left"))
    limit = f"max-width: {0.088 * width:.1f}rem"  # The same size of letters in every figure.
    return (
        f'<svg viewBox="0 0 {width} {height}" style="{limit}" role="img" aria-labelledby="{name}-title" '
        f'aria-describedby="{name}-desc"><title id="{name}-title">{title}</title>'
        f'<desc id="{name}-desc">{html.escape(description)}</desc>{text}'
    ).rstrip()
