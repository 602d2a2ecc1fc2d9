"""What commands share: progress on stderr, one JSON object on stdout, and the options most of them have."""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedproxy.errors import MissingExtraError, UsageError
from fedproxy.foreign import plain

if TYPE_CHECKING:
    from fedproxy.pipeline import Run

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let the LLM's own Python code run.")]
TrustTasks = Annotated[bool, typer.Option("--trust-tasks", help="Let code that the tasks in --include bring run.")]
_WIDTH = 250
"""Characters of a line of a table that goes to a file or another program."""
Out = Annotated[Path, typer.Option("--out", help="Directory to write.")]
OutUnlessDry = Annotated[
    Path | None, typer.Option("--out", help="Directory to write; not needed with --dry-run.", show_default=False)
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check the experiment and show what it would do and cost; write nothing."),
]
Tflops = Annotated[
    float | None,
    typer.Option(
        "--tflops",
        min=1e-6,
        help="With --dry-run: reckon times with so many TFLOP/s, in place of what this machine reaches.",
        show_default=False,
    ),
]


class Terminal(Console):
    """A console on which text is text: no markup unless a print asks for it, and nothing that steers the terminal."""

    def __init__(self, **how: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **how)

    def render_str(self, text: str, **how: Any) -> Text:
        """What rich makes of each text that is printed, by itself or in a table."""
        return super().render_str(plain(text, lines=True), **how)


@functools.cache
def console() -> Console:
    """Where messages for people go: stderr. It is one object, so that lines appear above a progress bar, not in it."""
    return Terminal(stderr=True)


def sheet(*, stderr: bool) -> Console:
    """Where wide tables go: on a terminal as wide as that, elsewhere without a cut."""
    shown = Terminal(stderr=stderr)
    return shown if shown.is_terminal else Terminal(stderr=stderr, width=_WIDTH)


def numbers(first: str, *others: str, title: str | None = None) -> Table:
    """A table of numbers, a row for each of what `first` names."""
    table = Table(first, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


class Lines(logging.Handler):
    """Shows what is logged as lines for people."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        console().print(self.format(record), soft_wrap=True)


def live() -> Live:
    """What shows a table that changes, on a terminal; elsewhere nothing."""
    return Live(console=console(), auto_refresh=False, transient=True)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float, str], None]]:
    """A bar a stage with what is being done and a time estimate; silent when stderr is no terminal."""
    target = console()
    bars = Progress(
        TextColumn("{task.description:<12}", style="bold", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[doing]}", style="dim", markup=False),
        console=target,
        disable=not target.is_terminal,
    )
    rows: dict[str, Any] = {}

    def show(stage: str, fraction: float, text: str) -> None:
        if stage not in rows:
            rows[stage] = bars.add_task(stage, total=1.0, doing=text)
        bars.update(rows[stage], completed=fraction, doing=text)

    with bars:
        yield show


@contextlib.contextmanager
def stage(name: str) -> Iterator[Callable[[float, str], None]]:
    """One bar, for a command of one stage."""
    with progress() as show:
        yield lambda fraction, text: show(name, fraction, text)


def needed(out: Path | None) -> Path:
    """The directory to write, in a command that is no dry run.

    Raises:
        UsageError: it is not given.
    """
    if out is None:
        raise UsageError("Give --out DIR, the directory to write, or --dry-run to see what would be done.")
    return out


def page_of(out: Path, make: Callable[[Path], Path]) -> Path | None:
    """Write the page of what lies in `out`; none, and a line that says why, where a package for it is missing."""
    try:
        return make(out)
    except MissingExtraError as error:
        console().print(f"No report.html: {error}")
        return None


def tell(value: object, text: str, *, json: bool) -> None:
    """Print one JSON object on stdout, or what it says for people on stderr."""
    if json:
        print_json(value)
    else:
        console().print(text, soft_wrap=True)


def tell_run(run: "Run", *, json: bool) -> None:
    """Say where the adapter of a federation lies, and what the clients say of it."""
    from fedproxy.artifacts import Manifest
    from fedproxy.reporting import validation_table

    text = f"{len(run.rounds)} rounds done; the tuned adapter of the proxy lies in {run.adapter}."
    tell({"path": run.path, "adapter": run.adapter, "rounds": run.rounds}, text, json=json)
    kept = Manifest.read(run.adapter).settings.get("round")
    if not json and (table := validation_table({"rounds": run.rounds, "kept_round": kept})) is not None:
        console().print(table)


def print_json(value: object) -> None:
    """Print one JSON object on stdout."""
    typer.echo(json.dumps(value, indent=2, default=str))
