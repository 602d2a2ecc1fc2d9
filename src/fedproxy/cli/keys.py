"""fedproxy keys."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedproxy.cli.output import Json, console, print_json, tell

app = typer.Typer(
    no_args_is_help=True,
    help="Make the owner's certificates and the clients' keys; register, revoke and list clients.",
    epilog="Example: fedproxy keys init keys --host fl.example.org",
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The owner's folder of keys.")]
Name = Annotated[str, typer.Argument(help="The client's name.")]


@app.command(epilog="Example: fedproxy keys init keys --host fl.example.org --host 192.0.2.7")
def init(
    folder: Folder,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Host name or IP address of the server; can be repeated. localhost is always added."),
    ] = None,
    json: Json = False,
) -> None:
    """Make a certificate authority and a server certificate."""
    from fedproxy.deployment.certificates import VALID_DAYS
    from fedproxy.deployment.keys import init_keys

    hosts = init_keys(folder, host or [])
    tell(
        {"path": folder, "hosts": hosts, "valid_days": VALID_DAYS},
        f"{folder} holds a certificate authority and a certificate for {', '.join(hosts)}, valid for {VALID_DAYS} "
        f"days. Keep it to yourself. Next, for each client: fedproxy keys add {folder} NAME",
        json=json,
    )


@app.command(epilog="Example: fedproxy keys add keys bank")
def add(
    folder: Folder,
    name: Name,
    public_key: Annotated[
        Path | None, typer.Option(help="The public key that the client made itself; none is made then.")
    ] = None,
    json: Json = False,
) -> None:
    """Register a client; without --public-key, make its key too."""
    from fedproxy.deployment.keys import CA, add_client, client_key_file

    client = add_client(folder, name, public_key)
    hand_over = folder / CA if public_key else client_key_file(folder, name)
    secret = "" if public_key else " It is secret: hand it over safely, then delete it here."
    text = f"{name} is registered ({client.fingerprint}). To hand over: {hand_over}.{secret}"
    tell({**dataclasses.asdict(client), "hand_over": hand_over}, text, json=json)


@app.command(epilog="Example: fedproxy keys new bank.key")
def new(
    file: Annotated[Path, typer.Argument(help="File to write the private key to; the public one is FILE.pub.")],
    json: Json = False,
) -> None:
    """Make a client's key at the client's, so that no private key travels."""
    from fedproxy.deployment.keys import new_key

    public = new_key(file)
    text = f"Send {public} to the owner, and ask for ca.crt. {file} is secret and stays here."
    tell({"private": file, "public": public}, text, json=json)


@app.command(epilog="Example: fedproxy keys revoke keys bank")
def revoke(folder: Folder, name: Name, json: Json = False) -> None:
    """Shut a client out for good; its name may be given to another key."""
    from fedproxy.deployment.keys import revoke_client

    client = revoke_client(folder, name)
    tell(dataclasses.asdict(client), f"{name} is revoked ({client.fingerprint}).", json=json)


@app.command("list", epilog="Example: fedproxy keys list keys")
def list_clients(folder: Folder, json: Json = False) -> None:
    """Show the registered clients."""
    from fedproxy.deployment.keys import read_registry

    clients = read_registry(folder).clients.values()
    if json:
        print_json({"clients": [dataclasses.asdict(client) for client in clients]})
        return
    table = Table("client", "state", "added")
    table.add_column("fingerprint", overflow="fold")
    for client in clients:
        table.add_row(client.name, client.state, client.added, client.fingerprint)
    console().print(table)
