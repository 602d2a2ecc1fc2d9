"""The command line: a file per command; each parses, calls the pipeline and prints."""

import importlib
import logging
import os
import signal
import sys
import typing
import warnings
from collections.abc import Iterator, Sequence

import click
import typer
from rich.text import Text

from fedproxy.cli.output import Lines, Terminal
from fedproxy.errors import FedproxyError, explained
from fedproxy.idle_threads import sleep_soon

INTERRUPTED = 130
_COMMANDS = (
    "demo", "run", "compress", "federate", "serve", "join", "merge", "fuse", "evaluate", "compare", "methods",
    "report", "audit", "log", "ledger", "init", "doctor",
)  # fmt: skip


def _command() -> click.Command:
    from fedproxy.cli import data, keys

    app = typer.Typer(
        name="fedproxy",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        suggest_commands=not hasattr(click.exceptions, "NoSuchCommand"),  # click 8.4 and later do it themselves
        rich_markup_mode="rich",
        help="Tune a large language model on several owners' data: the model stays at home, and so does the data.",
        epilog="Every command takes --debug, which shows the traceback of an error. Exit codes: 0 done, 1 our bug, "
        "2 usage or config, 3 bad input artifact, 4 federation failed, 5 disk or memory.",
    )
    for name in _COMMANDS:
        module = importlib.import_module(f"fedproxy.cli.{name}")
        app.command(name, epilog=f"Example: {module.EXAMPLE}")(getattr(module, name))
    app.add_typer(data.app, name="data")
    app.add_typer(keys.app, name="keys")
    group = typer.main.get_command(app)
    for command in _leaves(group):
        hints = typing.get_type_hints(command.callback.__wrapped__, include_extras=True)  # type: ignore[union-attr]
        for parameter in command.params:
            # typer 0.20 loses the help of arguments with click 8.4 and later, which reset it.
            if parameter.param_type_name == "argument":
                parameter.help = hints[parameter.name].__metadata__[0].help
    return group


def _leaves(command: click.Command) -> Iterator[click.Command]:
    for below in getattr(command, "commands", {}).values():
        yield from _leaves(below) if hasattr(below, "commands") else [below]


def _fail(error: BaseException, message: str, code: int, debug: bool) -> int:
    if debug:
        raise error
    Terminal(stderr=True, soft_wrap=True).print(Text("Error:", "bold red"), message)
    return code


def _join_team() -> None:
    """Go on only in the first of the processes that a launcher started; the others serve it."""
    from fedproxy.models.parallel import LEADER, form
    from fedproxy.models.worker import serve

    team = form()
    if team.rank != LEADER:
        serve(team)


def interruption(arguments: Sequence[str]) -> str:
    """What is said of a command that was interrupted: how it goes on, if it can.

    Args:
        arguments: Those of the command line, the command's name first.
    """
    command = getattr(_command(), "commands", {}).get(next(iter(arguments), ""))
    resumes = command is not None and any("--resume" in parameter.opts for parameter in command.params)
    return f"interrupted. What was complete is kept{'; go on with --resume' if resumes else ''}."


def _at_home(argument: str) -> str:
    """An argument, or an option's value after "=", with the home directory for a ~ that no shell has replaced."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + equals + os.path.expanduser(value)


def _read_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale has another encoding, for names of files and for output."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def _hush() -> None:
    """Ignore, in all threads, what a library says of itself: `warnings.catch_warnings` would be undone by another's."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sleep_soon()
    if arguments is None:
        _read_utf8()
    arguments = [_at_home(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _hush()
    logger = logging.getLogger("fedproxy")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(Lines())
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _join_team()
    try:
        code = _command()(arguments, prog_name="fedproxy", standalone_mode=False)
        if code == INTERRUPTED:  # typer catches the interrupt and says nothing
            raise KeyboardInterrupt
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = _fail(KeyboardInterrupt(), interruption(arguments), INTERRUPTED, False)
    except FedproxyError as error:
        code = _fail(error, str(error), error.exit_code, debug)
    except BrokenPipeError:
        code = 0
    except Exception as error:
        known = explained(error)
        code = _fail(error, str(known), known.exit_code, debug)
    sys.exit(code if isinstance(code, int) else 0)
