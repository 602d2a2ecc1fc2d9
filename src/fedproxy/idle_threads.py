"""How long a thread that waits for the others keeps its processor.

PyTorch's threads on Linux (GNU OpenMP) wait for each other in a loop of some milliseconds before they sleep. Where
another process is at work on the same processors, the one waited for may get none meanwhile, and a step of training
takes a hundred times as long (`benchmarks/busy_machine.py`). GNU OpenMP waits a thousand turns where it
knows that threads are more than processors; of other processes it does not know.
"""

import os

_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Environment variables by which a user chooses."""
TURNS = 1000


def sleep_soon() -> None:
    """Let idle threads of this process and its children sleep soon, unless the user chose; before torch is imported."""
    if not any(name in os.environ for name in _CHOSEN):
        os.environ["GOMP_SPINCOUNT"] = str(TURNS)
