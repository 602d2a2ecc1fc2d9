"""fedproxy keys."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedproxy.cli.output import Json, console, print_json, tell

app = typer.Typer(
    no_args_is_help=True,
    help="Make the owner's certificates and the clients' keys; register, rotate, revoke and list clients.",
    epilog="Example: fedproxy keys init keys --host fl.example.org",
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The owner's folder of keys.")]
Name = Annotated[str, typer.Argument(help="The client's name.")]
PublicKey = Annotated[
    Path | None, typer.Option("--public-key", help="The public key that the client made itself; none is made then.")
]
_SECRET = " It is secret: hand it over safely, then delete it here."


@app.command(epilog="Example: fedproxy keys init keys --host fl.example.org --host 192.0.2.7")
def init(
    folder: Folder,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Host name or IP address of the server; can be repeated. localhost is always added."),
    ] = None,
    ca_key: Annotated[
        Path | None,
        typer.Option(help="File for the CA's private key, off this machine perhaps; DIR/ca.key if not given."),
    ] = None,
    json: Json = False,
) -> None:
    """Make a certificate authority and a server certificate."""
    from fedproxy.deployment.certificates import SERVER_DAYS
    from fedproxy.deployment.keys import CA_KEY, init_keys

    hosts = init_keys(folder, host or [], ca_key)
    signing = ca_key or folder / CA_KEY
    tell(
        {"path": folder, "hosts": hosts, "valid_days": SERVER_DAYS, "ca_key": signing},
        f"{folder} holds a certificate authority and a certificate for {', '.join(hosts)}, valid for {SERVER_DAYS} "
        f"days. Keep it to yourself, and {signing} above all. Next, for each client: fedproxy keys add {folder} NAME",
        json=json,
    )


@app.command(epilog="Example: fedproxy keys renew keys --ca-key /media/stick/ca.key")
def renew(
    folder: Folder,
    ca_key: Annotated[Path | None, typer.Option(help="The CA's private key, if it does not lie in DIR.")] = None,
    json: Json = False,
) -> None:
    """Make the server a new certificate by the same CA; clients need nothing, a running server its next start."""
    from fedproxy.deployment.certificates import SERVER_DAYS
    from fedproxy.deployment.keys import renew_server

    hosts = renew_server(folder, ca_key)
    text = f"{folder} holds a new certificate for {', '.join(hosts)}, valid for {SERVER_DAYS} days from now."
    tell({"path": folder, "hosts": hosts, "valid_days": SERVER_DAYS}, text, json=json)


@app.command(epilog="Example: fedproxy keys add keys bank")
def add(
    folder: Folder,
    name: Name,
    public_key: PublicKey = None,
    json: Json = False,
) -> None:
    """Register a client; without --public-key, make its key too."""
    from fedproxy.deployment.keys import CA, add_client, client_key_file

    client = add_client(folder, name, public_key)
    hand_over = folder / CA if public_key else client_key_file(folder, name)
    text = f"{name} is registered ({client.fingerprint}). To hand over: {hand_over}.{'' if public_key else _SECRET}"
    tell({**dataclasses.asdict(client), "hand_over": hand_over}, text, json=json)


@app.command(epilog="Example: fedproxy keys rotate keys bank")
def rotate(folder: Folder, name: Name, public_key: PublicKey = None, json: Json = False) -> None:
    """Give a client another key; the old one is revoked at once. Without --public-key, make the new one."""
    from fedproxy.deployment.keys import client_key_file, rotate_client

    client = rotate_client(folder, name, public_key)
    made = None if public_key else client_key_file(folder, name)
    text = f"{name} has a new key ({client.fingerprint}), and its old one is revoked."
    tell(
        {**dataclasses.asdict(client), "hand_over": made},
        f"{text} To hand over: {made}.{_SECRET}" if made else text,
        json=json,
    )


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
