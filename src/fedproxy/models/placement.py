"""Where an LLM is run: in memory, on several GPUs, or block by block from its files; chosen by what is free."""

import logging

import torch

from fedproxy.artifacts import destined
from fedproxy.errors import UsageError
from fedproxy.memory import available_memory
from fedproxy.models.block_stream import BlockStream
from fedproxy.models.checkpoints import load_model
from fedproxy.models.precision import bf16_is_fast
from fedproxy.models.source import Source

PLACEMENTS = ("auto", "memory", "stream")
ROOM = 1.25
"""What running a model takes, relative to its weights."""
_log = logging.getLogger(__name__)


def open_stream(source: Source, placement: str = "auto") -> BlockStream:
    """Make an LLM ready to be run block by block; what was chosen, and why, is logged.

    Args:
        source: The LLM; one in memory is run where it is.
        placement: "memory" (on the GPUs if there are any), "stream" (one block at a time from the files), or "auto":
            memory if there is room for it.

    Raises:
        UsageError: there is no such placement.
        ArtifactError: weights are missing.
    """
    check_placement(placement)
    if source.loaded:
        return BlockStream(source.decoder)
    gpus = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
    largest = torch.device("cuda", gpus.index(max(gpus))) if gpus else torch.device("cpu")
    dtype = computed_in(largest, source.files.dtype)
    needed = int(source.files.bytes * ROOM * (dtype or source.files.dtype).itemsize / source.files.dtype.itemsize)
    free = sum(gpus) if gpus else available_memory()
    where = f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}" if gpus else "memory"
    room = f"{needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free in {where}"
    if placement == "stream" or (placement == "auto" and needed > free):
        _log.info("%s is run one block at a time from its files (%s).", destined(source.path), room)
        return BlockStream(source.decoder, source, largest, dtype=dtype)
    _log.info("%s is run in %s (%s).", destined(source.path), where, room)
    if gpus and needed > max(gpus) and not source.multimodal:
        return BlockStream(load_model(source.path, device_map="auto", trust_remote_code=source.trust_remote_code))
    return BlockStream(source.decoder, source, largest, resident=True, dtype=dtype)


def computed_in(device: torch.device, stored: torch.dtype) -> torch.dtype | None:
    """The data type in which weights are multiplied that are read from files; none for their own.

    A CPU that does not multiply 16-bit numbers in hardware is some ten times as fast in float32.
    """
    return torch.float32 if device.type == "cpu" and stored.itemsize == 2 and not bf16_is_fast(device) else None


def check_placement(placement: str) -> None:
    """Check that there is such a placement.

    Raises:
        UsageError: there is not.
    """
    if placement not in PLACEMENTS:
        raise UsageError(f"unknown placement {placement!r}; there are: {', '.join(PLACEMENTS)}.")
