"""fedproxy serve."""

from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.live import live_page
from fedproxy.cli.output import Json, Out, Overwrite, Resume, console, tell_run
from fedproxy.cli.rounds_table import rounds_table
from fedproxy.cli.sheets import print_sheet

EXAMPLE = "fedproxy serve experiment.toml --out runs/first --keys keys --listen 0.0.0.0:9443"

Keys = Annotated[Path | None, typer.Option("--keys", help="Your folder of keys, from `fedproxy keys init`.")]
ListenAt = Annotated[str, typer.Option("--listen", help="HOST:PORT that clients join; port 0 takes a free one.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Without keys and TLS, on loopback only.")]
Force = Annotated[bool, typer.Option("--force", help="With --insecure: beyond loopback, too.")]
Page = Annotated[str, typer.Option("--page", help="HOST:PORT to show the page of the run at: read-only, over HTTP.")]
PartMegabytes = Annotated[int, typer.Option("--part-mb", min=1, max=2047, help="Size of the proxy's parts, in MiB.")]


def serve(
    experiment: Annotated[Path, typer.Argument(help="The experiment file (TOML).")],
    out: Out,
    keys: Keys = None,
    listen: ListenAt = "127.0.0.1:9443",
    insecure: Insecure = False,
    force: Force = False,
    part_mb: PartMegabytes = 64,
    page: Page = "",
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Compress the LLM, hand its proxy to clients that join over the network, and merge what they send."""
    from fedproxy.deployment.address import Address
    from fedproxy.deployment.serving import Listen
    from fedproxy.errors import UsageError
    from fedproxy.pipeline import federate

    if insecure == (keys is not None):
        raise UsageError("Give --keys DIR (make one with `fedproxy keys init DIR`), or --insecure without keys.")
    shown = Address.parse(page) if page else None
    where = Listen(Address.parse(listen), keys, force, part_mb << 20)

    def ready(address: str) -> None:
        console().print(f"Clients can join at {address}.")

    with live_page(out, shown) as begin, rounds_table(out, resume=resume) as update:
        run = federate(
            experiment,
            out,
            engine="deployment",
            listen=where,
            resume=resume,
            overwrite=overwrite,
            on_progress=lambda stage, fraction, text: begin(),
            on_sheet=print_sheet,
            on_ready=ready,
            on_poll=update,
        )
    tell_run(run, json=json)
