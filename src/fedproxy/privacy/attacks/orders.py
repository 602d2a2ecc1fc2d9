"""What a server may order of a client: the run's own settings, or those under which an update tells most."""

from typing import Any

from fedproxy.federation.offer import Limits

LIMITS = Limits()
"""What a client allows that sets no limit of its own."""
EPSILON = 1e3
"""An adam_epsilon far above every entry of a gradient."""
RATE = 0.3
"""Step along the gradient that the settings of a malicious server come to."""


def nearly_linear(epsilon: float = EPSILON) -> dict[str, Any]:
    """Settings of [train] under which an update is nearly a sum of gradients.

    Adam divides each entry of a gradient by its size plus epsilon. With an epsilon far above all sizes it divides all
    by the same number, which the learning rate makes up for.

    Args:
        epsilon: The adam_epsilon.
    """
    return {
        "adam_epsilon": epsilon,
        "learning_rate": RATE * epsilon,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "lora_dropout": 0.0,
        "precision": "fp32",
    }


def few_steps(rows: int) -> dict[str, Any]:
    """Settings of [train] for the fewest steps that a client allows, each on all rows.

    Args:
        rows: The rows.
    """
    steps = LIMITS.min_steps
    return {"batch_size": rows, "gradient_accumulation_steps": 1, "max_steps": steps, "epochs": float(steps)}


def counted(number: int, what: str) -> str:
    """A number of things, as in "1 row" and "4 rows"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
