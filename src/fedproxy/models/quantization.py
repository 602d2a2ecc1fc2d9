"""Frozen weights in four bits, for adapters that are trained on them (QLoRA)."""

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils.import_utils import is_bitsandbytes_available

from fedproxy.errors import MissingExtraError, UsageError

BYTES_A_WEIGHT = 4 / 8 + 1 / 64 + 4 / (64 * 256)
"""Four bits; for 64 weights a scale of eight bits, for 256 scales one of 32 bits."""


def four_bit() -> BitsAndBytesConfig:
    """NormalFloat in four bits, its scales quantised once more; computed in bfloat16.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        UsageError: it knows none of this machine's devices.

    Reference:
        Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, Eq. 3-6.
    """
    if not is_bitsandbytes_available():
        raise MissingExtraError('quantization = "4bit"', "qlora")
    from transformers.integrations.bitsandbytes import validate_bnb_backend_availability

    if not validate_bnb_backend_availability():  # type: ignore[no-untyped-call]
        raise UsageError(
            'quantization = "4bit": the bitsandbytes that is installed can use no device of this machine. Use a newer '
            'one, a machine with a GPU, or quantization = "none".'
        )
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def keep_gradients(model: nn.Module) -> None:
    """Keep quantised layers on a CPU from changing, in evaluation, to a layout that has no gradients."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
