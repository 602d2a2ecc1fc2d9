"""The proxy as a checkpoint of its own, proven to compute what the LLM computes with the same blocks skipped."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fedproxy.errors import ArtifactError
from fedproxy.models.checkpoints import Model, load_model, save_checkpoint
from fedproxy.models.families import blocks, keep_blocks, skipping


def write_proxy(directory: Path, model: Model, source: Path, keep: Sequence[int], probe: torch.Tensor) -> int:
    """Remove all blocks but `keep` from `model`, write it as a checkpoint, and compare the checkpoint with the LLM.

    Args:
        directory: Existing directory to fill.
        model: The LLM, on the CPU; changed in place.
        source: The LLM's checkpoint, which the tokenizer files come from.
        keep: Rising block numbers, 0-based.
        probe: Some token numbers to compare on, [1, tokens].

    Returns:
        Number of parameters of the proxy.

    Raises:
        ArtifactError: what a block of this LLM computes depends on its position, so that it cannot be moved.
    """
    removed = sorted(set(range(len(blocks(model)))) - set(keep))
    with torch.no_grad(), skipping(model, removed):
        expected = model(input_ids=probe, use_cache=False).logits.float()
    save_checkpoint(directory, keep_blocks(model, keep), source)
    proxy = load_model(directory)
    with torch.no_grad():
        found = proxy(input_ids=probe, use_cache=False).logits.float()
    tolerance = 8 * torch.finfo(model.dtype).eps * float(expected.abs().max())
    if not torch.allclose(found, expected, rtol=0, atol=tolerance):
        raise ArtifactError(
            f"{type(model).__name__} cannot be compressed: the written proxy differs by "
            f"{float((found - expected).abs().max()):.2g} from the LLM with the same blocks skipped, "
            "so what a block computes depends on its position."
        )
    return sum(parameter.numel() for parameter in proxy.parameters())
