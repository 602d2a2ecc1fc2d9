"""fedproxy doctor."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import Json, console, print_json
from fedproxy.errors import FedproxyError

EXAMPLE = "fedproxy doctor experiment.toml"
EXTRAS = {
    "data": ("datasets",),
    "eval": ("lm_eval", "datasets"),
    "report": ("jinja2", "matplotlib"),
    "federation": ("cryptography", "flwr"),
    "simulation": ("ray",),
    "speed": ("numba",),
    "qlora": ("bitsandbytes",),
}


def doctor(
    experiment: Annotated[
        Path | None, typer.Argument(help="An experiment file, to look at all that it names.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Show versions and devices, what is missing and how to get it, and whether an experiment can be run here."""
    from fedproxy.run_directory import environment

    found = environment()
    missing = {
        extra: [name for name in modules if importlib.util.find_spec(name) is None] for extra, modules in EXTRAS.items()
    }
    found["missing"] = {extra: names for extra, names in missing.items() if names}
    if not json:
        terminal = console()
        for name, version in found["versions"].items():
            terminal.print(f"{name:14} {version}")
        terminal.print(f"{'python':14} {found['python']}\n{'platform':14} {found['platform']}")
        terminal.print(f"{'device':14} {found['device']} ({found['cpus']} CPUs, {found['threads']} threads)")
        for extra, names in found["missing"].items():
            terminal.print(f"optional, not installed: {', '.join(names)}. Get it with: pip install 'fedproxy[{extra}]'")
        if not found["missing"]:
            terminal.print("Nothing is missing.")
    code = 0
    if experiment is not None:
        found["experiment"], code = _examined(experiment, show=not json)
    if json:
        print_json(found)
    raise typer.Exit(code)


def _examined(experiment: Path, *, show: bool) -> tuple[list[dict[str, object]], int]:
    """What was found of an experiment, and the exit code of the first fault."""
    from fedproxy.forecast import diagnose

    findings: list[dict[str, object]] = []
    code = 0
    for what, found in diagnose(experiment):
        fault = isinstance(found, FedproxyError)
        findings.append({"of": what, "found": None if fault else found, "fault": str(found) if fault else None})
        if isinstance(found, FedproxyError):
            code = code or found.exit_code
        if show:
            console().print(f"{'✗' if fault else '✓'} {what}: {found}", style="red" if fault else None, soft_wrap=True)
    return findings, code
