"""fedproxy doctor."""

import importlib.util

from fedproxy.cli.output import Json, console, print_json

EXAMPLE = "fedproxy doctor"
EXTRAS = {
    "data": ("datasets",),
    "eval": ("lm_eval", "datasets"),
    "report": ("jinja2", "matplotlib"),
    "federation": ("cryptography", "flwr"),
    "simulation": ("ray",),
    "speed": ("numba",),
    "qlora": ("bitsandbytes",),
}


def doctor(json: Json = False) -> None:
    """Show versions and devices, what is missing and how to get it."""
    from fedproxy.run_directory import environment

    found = environment()
    missing = {
        extra: [name for name in modules if importlib.util.find_spec(name) is None] for extra, modules in EXTRAS.items()
    }
    found["missing"] = {extra: names for extra, names in missing.items() if names}
    if json:
        print_json(found)
        return
    terminal = console()
    for name, version in found["versions"].items():
        terminal.print(f"{name:14} {version}")
    terminal.print(f"{'python':14} {found['python']}\n{'platform':14} {found['platform']}")
    terminal.print(f"{'device':14} {found['device']} ({found['cpus']} CPUs, {found['threads']} threads)")
    for extra, names in found["missing"].items():
        terminal.print(f"missing: {', '.join(names)}. Get it with: pip install 'fedproxy[{extra}]'")
    if not found["missing"]:
        terminal.print("Nothing is missing.")
