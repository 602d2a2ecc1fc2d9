"""The table of docs/secure_sums.md: what a secure sum costs a client and the server."""

from typing import Any

STEPS = ("mask", "agree", "reveal")


def secured(result: dict[str, Any]) -> str:
    """Seconds and bytes of one sum, and of the keys before it, by number of clients and how many were lost.

    Args:
        result: What benchmarks/results/secure_sums.json holds.
    """
    lines = [
        "| clients | lost | a client: keys and shares | a client: a sum | the server: a sum | a client, up | a client, down |",
        "|---" * 7 + "|",
    ]
    for clients, group in result["groups"].items():
        keys = sum(one["median"] for one in group["member_seconds"].values())
        for lost, one in group["sums"].items():
            own = sum(one["member_seconds"][step]["median"] for step in STEPS)
            way = [
                sum(some[way] for some in (*group["member_bytes"].values(), *one["member_bytes"].values()))
                for way in ("up", "down")
            ]
            server = sum(one["server_seconds"].values())
            cells = (clients, lost, seconds(keys), seconds(own), seconds(server), kilobytes(way[0]), kilobytes(way[1]))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds(value: float) -> str:
    """Seconds, with two digits that count."""
    return f"{value:.2g} s"


def kilobytes(value: int) -> str:
    """Bytes in kB."""
    return f"{value / 1000:,.0f} kB"
