"""Error feedback: what an encoding loses of a round's update is added to the next one.

    c_t = u_t + e_{t-1},   û_t = decode(encode(c_t)),   e_t = c_t − û_t,   e_0 = 0

so Σ û_t = Σ u_t − e_T: nothing is lost for good, it comes late.

Reference: Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of
Speech DNNs", 2014. Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", 2019,
Alg. 1 (there with the step size inside; an update holds it already).
"""

import torch

from fedproxy.federation.wire.contract import Encoding, Options, Parts
from fedproxy.tensors import Tensors, check_layout


def feedback(
    update: Tensors, residual: Tensors | None, encoding: Encoding[Options], options: Options, *, seed: int, share: float
) -> tuple[Parts, Parts, Parts]:
    """Encode an update and what the rounds before lost.

    Args:
        update: u_t.
        residual: e_{t-1}, float32; none before the first round.
        encoding: How it travels.
        options: Its options.
        seed: The client's for the round.
        share: The round's.

    Returns:
        The parts that travel; û_t, float32, as the server reads it, to the bit; and e_t, float32.

    Raises:
        ArtifactError: the residual is of another adapter, or a sum is NaN or infinite.
    """
    corrected = {name: tensor.detach().to("cpu", dtype=torch.float32) for name, tensor in update.items()}
    if residual is not None:
        check_layout(corrected, residual, "the residual")
        corrected = {name: tensor + residual[name] for name, tensor in corrected.items()}
    parts = encoding.encode(corrected, options, seed=seed, share=share)
    shapes = {name: tensor.shape for name, tensor in corrected.items()}
    decoded = dict(encoding.decode(parts, shapes, options, "this client", share=share))
    return parts, decoded, {name: tensor - decoded[name] for name, tensor in corrected.items()}
