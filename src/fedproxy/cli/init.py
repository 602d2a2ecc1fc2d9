"""fedproxy init."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import Json, Overwrite, tell
from fedproxy.errors import UsageError

EXAMPLE = "fedproxy init --llm ./llm --calibration public.txt --client bank=bank.csv --client travel=travel.jsonl"


def init(
    out: Annotated[Path, typer.Option(help="The experiment file to write.")] = Path("experiment.toml"),
    llm: Annotated[
        str, typer.Option(help='The LLM: a checkpoint directory or Hub id, or "demo" for the small one of the package.')
    ] = "",
    calibration: Annotated[
        str,
        typer.Option(help='Public text, or public rows, to score its blocks on, or "demo" for that of the package.'),
    ] = "",
    client: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="A client and its rows (repeatable).")
    ] = None,
    data: Annotated[str, typer.Option(help="Or one file of rows, divided among clients.")] = "",
    clients: Annotated[int | None, typer.Option(help="With --data: how many clients.", min=1)] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a commented experiment file. On a terminal it asks for what no option gives."""
    from fedproxy.artifacts import check_file, new_file
    from fedproxy.checkpoint_files import check_place
    from fedproxy.config import Partition, experiment_file
    from fedproxy.data import partition, read_rows
    from fedproxy.demo import CALIBRATION, LLM, given_or_own
    from fedproxy.public_text import read_documents

    check_file(out, overwrite=overwrite)
    if client and data:
        raise UsageError("--client and --data exclude each other: each client has its own rows, or all share a file's.")
    if clients and not data:
        raise UsageError("--clients says among how many clients the rows of --data are divided.")
    llm = llm or _asked("--llm", "The LLM, a directory or Hub id")
    calibration = calibration or _asked("--calibration", "Public text to score its blocks on, a file")
    llm, calibration = given_or_own(llm, LLM), given_or_own(calibration, CALIBRATION)
    named = dict(_split(client or ()))
    if not named and not data:
        question = "One file of rows that clients share out, or nothing to name clients one by one"
        data = _asked("--client or --data", question, empty=True)
        named = {} if data else dict(_asked_clients())
    cut = None
    if data:
        rows = read_rows(data)
        cut = Partition(
            data=data,
            clients=clients or int(_asked("--clients", "How many clients", kind=int)),
            scheme="dirichlet" if all("label" in row for row in rows) else "iid",
        )
        partition(rows, cut.clients, cut.scheme, cut.alpha)
    for file in named.values():
        read_rows(file)
    text = experiment_file(llm, calibration, clients=named, partition=cut, folder=out.parent)
    check_place(llm)
    read_documents(calibration)
    with new_file(out, overwrite=overwrite) as written:
        written.write(text.encode())
    first = next(iter(named.values()), data)
    then = f"fedproxy data check {first} --model {llm}", f"fedproxy run {out} --dry-run"
    tell({"path": out, "next": then}, f"{out} is written. Next: {then[0]}, then: {then[1]}", json=json)


def _asked(option: str, question: str, *, empty: bool = False, kind: type = str) -> str:
    """The answer to a question, where somebody can be asked."""
    if not sys.stdin.isatty():
        raise UsageError(f"Give {option}: no terminal is there to ask on.")
    bare = {"default": "", "show_default": False} if empty else {"type": kind}
    return os.path.expanduser(str(typer.prompt(question, err=True, **bare)).strip())


def _split(given: Iterable[str]) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for one in given:
        name, equals, file = (part.strip() for part in one.partition("="))
        if not (name and equals and file):
            raise UsageError(f"--client {one}: must be NAME=FILE.")
        if name in seen:
            raise UsageError(f"--client {one}: another client is called {name}.")
        seen.add(name)
        yield name, file


def _asked_clients() -> Iterator[tuple[str, str]]:
    number = 1
    while name := _asked("--client", f"Client {number}, its name" + ", or nothing to end" * (number > 1), empty=True):
        yield name, _asked("--client", f"The rows of {name}, a file")
        number += 1
