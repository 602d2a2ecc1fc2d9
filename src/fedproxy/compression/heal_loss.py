"""What the proxy learns from the LLM: its next-token distribution, and its hidden states where blocks were kept."""

from dataclasses import dataclass

import torch

_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class TopTokens:
    """Next-token distributions, reduced to their likeliest tokens and one bucket for all others.

    Attributes:
        index: The likeliest tokens, [tokens, k].
        log_p: Their log-probabilities, float32 [tokens, k].
        rest: Log of the probability of all other tokens together, float32 [tokens]; -inf if there are none.
    """

    index: torch.Tensor
    log_p: torch.Tensor
    rest: torch.Tensor


def top_tokens(logits: torch.Tensor, k: int, temperature: float) -> TopTokens:
    """Reduce the distributions softmax(logits / temperature) to their k likeliest tokens.

    Args:
        logits: [tokens, vocabulary].
        k: How many; with the whole vocabulary, or more, nothing is lost.
        temperature: Divides the logits.
    """
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    values, index = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    return TopTokens(index, values, log_p.scatter(-1, index, -torch.inf).logsumexp(dim=-1))


def divergence(teacher: TopTokens, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean over tokens of KL(teacher ‖ student), over the teacher's likeliest tokens and the rest.

    KL = Σ_j p_j (log p_j - log q_j) + p_rest (log p_rest - log q_rest), a lower bound of the divergence over the whole
    vocabulary, equal to it when the teacher kept the whole vocabulary. Computed in float32.

    Args:
        teacher: The teacher's distributions at the temperature.
        logits: The student's logits, [tokens, vocabulary].
        temperature: Divides the student's logits.

    Returns:
        A scalar, in nats.

    Reference:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
    """
    scaled = logits.float() / temperature
    total = scaled.logsumexp(dim=-1)
    log_q = scaled.gather(-1, teacher.index) - total[:, None]
    log_p = teacher.log_p.clamp(min=_LOWEST)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    if teacher.index.shape[-1] < scaled.shape[-1]:
        rest = teacher.rest.clamp(min=_LOWEST)
        kl = kl + rest.exp() * (rest - (scaled.scatter(-1, teacher.index, -torch.inf).logsumexp(dim=-1) - total))
    return kl.mean()


def hidden_distance(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of ‖student - teacher‖² / ‖teacher‖², 0 for a token where the teacher's is zero.

    The ratio is taken token by token, because in many models the hidden state of the first token is a thousand times
    longer than all others and would be all that counts. Computed in float32.

    Args:
        teacher: Hidden states, [tokens, width].
        student: Hidden states, [tokens, width].
    """
    distance = (student.float() - teacher.float()).square().sum(dim=-1)
    length = teacher.float().square().sum(dim=-1)
    return torch.where(length > 0, distance / length.where(length > 0, 1.0), 0.0).mean()
