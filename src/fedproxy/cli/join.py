"""fedproxy join."""

from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import TrustRemoteCode, TrustTasks, console, progress

EXAMPLE = "fedproxy join fedproxy.example.org:9443 --data tickets.jsonl --key bank.key"


def join(
    address: Annotated[str, typer.Argument(help="HOST:PORT of the server.")],
    data: Annotated[
        Path | None, typer.Option(help="Your rows (JSON Lines); with --task the folder of its data.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Your key file.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The server's CA certificate, if not in the key file.")] = None,
    task: Annotated[str, typer.Option(help="A harness task instead of a file of rows.")] = "",
    include: Annotated[Path | None, typer.Option(help="With --task: folder of your own task YAMLs.")] = None,
    trust_tasks: TrustTasks = False,
    name: Annotated[str, typer.Option(help="Your name, in a federation without keys.")] = "",
    max_steps: Annotated[int | None, typer.Option(min=1, help="Decline more optimizer steps a round.")] = None,
    max_rounds: Annotated[int | None, typer.Option(min=1, help="Decline more rounds.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Where proxies are kept, and what you remember of a run (default: ~/.cache/fedproxy/proxies)."
        ),
    ] = None,
    patience: Annotated[str, typer.Option(help="How long a server that is away is waited for.")] = "10m",
    wire: Annotated[
        list[str] | None,
        typer.Option(help="Encoding of updates that you agree to beside fp32 (repeatable; default: all)."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without key and TLS, on loopback only.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --insecure: beyond loopback, too.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Take part in a federation with your data, which stay here, until its last round."""
    from fedproxy.config import Client, Evaluate, seconds
    from fedproxy.deployment.address import Address
    from fedproxy.deployment.joining import Joining
    from fedproxy.deployment.joining import join as take_part
    from fedproxy.deployment.welcome import Welcome
    from fedproxy.errors import UsageError
    from fedproxy.federation.offer import Limits
    from fedproxy.federation.wire import ENCODINGS, encoding

    if insecure == (key is not None):
        raise UsageError("Give --key FILE, or --insecure for a federation without keys.")
    if data is None and not task:
        raise UsageError("Give --data FILE, or --task NAME.")
    try:
        wait = seconds(patience)
    except ValueError as error:
        raise UsageError(f"--patience: {error}.") from error
    own = Client(data="" if task else str(data), task=task)
    where = Evaluate(data=str(data or "") if task else "", include=str(include or ""), trust_tasks=trust_tasks)
    joining = Joining(
        Address.parse(address),
        key,
        ca,
        name,
        own,
        where,
        Limits(True, max_steps, max_rounds),
        cache,
        force,
        trust_remote_code,
        wait,
        tuple(ENCODINGS) if wire is None else tuple(encoding(name, {})[0].name for name in wire),
    )
    rounds = 1

    def welcomed(welcome: Welcome) -> None:
        nonlocal rounds
        offer = welcome.offer
        rounds = offer.federate.rounds
        console().print(
            f"{address} knows you as {welcome.name}: {offer.run}, {rounds} rounds, {offer.train.epochs:g} epochs "
            f"each, learning rate {offer.train.learning_rate:g}, LoRA rank {offer.train.lora_r}, updates as "
            f"{offer.federate.wire}.",
        )

    with progress() as show:
        take_part(
            joining,
            on_welcome=welcomed,
            on_bytes=lambda done, total: show("proxy", done / max(total, 1), f"{done / 1e6:.0f}/{total / 1e6:.0f} MB"),
            on_ready=lambda rows, steps: console().print(f"Ready: {rows} rows, {steps} steps a round."),
            on_step=lambda number, step, steps, loss: show(
                "training",
                (number - 1 + step / steps) / rounds,
                f"round {number}/{rounds} · step {step}/{steps} · loss {loss:.3f}",
            ),
            on_answer=lambda size: console().print(f"Sent an update of {size / 1e6:.1f} MB."),
            on_refusal=lambda reason: console().print(f"Refused the order: {reason}"),
        )
    console().print("The federation is complete.")
