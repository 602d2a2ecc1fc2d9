"""In which data type models compute: what their checkpoint holds, and what the device multiplies in hardware."""

from pathlib import Path

import torch

from fedproxy.models.checkpoints import load_config


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def scored_dtype() -> torch.dtype | None:
    """The data type of the weights with which a checkpoint is scored: its own where there is a GPU, else float32."""
    return None if torch.cuda.is_available() else torch.float32


def scored_products(checkpoint: str | Path, *, trust_remote_code: bool = False) -> torch.dtype | None:
    """What matrix products are narrowed to on a CPU while a checkpoint is scored; None for its weights' data type.

    bfloat16, if the checkpoint is stored so and the processor multiplies it in hardware; the rest stays in float32.

    Raises:
        ArtifactError: the checkpoint cannot be read.
    """
    if torch.cuda.is_available() or not bf16_is_fast(torch.device("cpu")):
        return None
    stored = load_config(checkpoint, trust_remote_code=trust_remote_code).dtype
    return torch.bfloat16 if stored == torch.bfloat16 else None
