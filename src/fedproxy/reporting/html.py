"""Pages from templates: everything inline, a few lines of script that the page works without, nothing from a network.

The page's own policy (Content-Security-Policy) lets that one script run, known by its hash, and nothing else load but,
while a run is under way, the page itself.
"""

import base64
import hashlib
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from fedproxy.artifacts import new_file
from fedproxy.errors import MissingExtraError, UsageError
from fedproxy.reporting import units

T = TypeVar("T")
Column = tuple[str, list[tuple[Any, str]]]


def fill(template: str, *, status: str = "", live: bool = False, **values: Any) -> str:
    """Fill in a template of this package.

    Args:
        template: Its name.
        status: A line at the head of the page that says what is happening, if anything is.
        live: Let the page look for a newer one of itself, and show that.
        **values: What the template uses.

    Raises:
        MissingExtraError: the extra `report` is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise MissingExtraError("The report", "report") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedproxy.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(units, name) for name in ("percent", "size", "duration", "decimals")}
    style, sort, look = (
        files("fedproxy.reporting").joinpath("templates", name).read_text(encoding="utf-8")
        for name in ("style.css", "sort.js", "live.js")
    )
    script = sort + look if live else sort
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        script=Markup(script),
        style=Markup(style),
        script_hash=f"sha256-{digest}",
        status=status,
        live=live,
        **values,
    )


def column_of(title: str, rows: Iterable[T], value: Callable[[T], Any], show: Callable[[Any], str]) -> Column:
    """A column of a table: its title, and in each row what it is sorted by (None: nothing), and what it says."""
    return title, [(found, show(found)) for found in map(value, rows)]


def write_page(path: Path, html: str) -> None:
    """Write a page; one that is there is replaced.

    Raises:
        UsageError: something else is there, or the page cannot be written.
    """
    if path.is_file():
        with open(path, "rb") as file:
            begin = file.read(1 << 16)
        if begin and b"fedproxy report</title>" not in begin:
            raise UsageError(f"{path} exists and is no page of fedproxy. Give another path.")
    with new_file(path) as page:
        page.write(html.encode())
