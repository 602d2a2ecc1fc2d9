"""The training loop of healing: a process may begin at any step, and all end in the same bits."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedproxy.artifacts import parse_json
from fedproxy.compression.heal_loss import divergence, hidden_distance
from fedproxy.compression.heal_student import Student
from fedproxy.compression.teacher import Teacher, check_same
from fedproxy.config import Heal
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models.encoding import Encoded
from fedproxy.models.layouts import collate
from fedproxy.models.training import batches
from fedproxy.seeds import derive_seed
from fedproxy.tensor_files import load_tensors, read_header, save_tensors

FILE = "state.safetensors"
_DESCRIPTION = "fedproxy.heal"
_NOT_OF_THE_TRAINING = ("top_k", "text", "save_every", "held_out", "spare_ends", "realign_steps")
_WARM_UP = 0.1
_MOST_GRADIENT = 1.0


@dataclass(frozen=True)
class Loss:
    """What a batch lost, before its step.

    Attributes:
        divergence: KL(LLM ‖ proxy) at the temperature, in nats per token.
        hidden: Mean squared distance of the hidden states, relative to the LLM's; 0 if they are not compared.
    """

    divergence: float
    hidden: float


def rate(step: int, steps: int) -> float:
    """Return the share of the learning rate in a step counted from 0: up in a tenth of the steps, then down to 0."""
    warm = max(1, round(_WARM_UP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def distil(
    student: Student,
    teacher: Teacher,
    texts: Sequence[Encoded],
    settings: Heal,
    *,
    proxy: str,
    pad: int,
    seed: int,
    work: Path,
    on_step: Callable[[int, Loss], None],
) -> list[Loss]:
    """Train the student to say what the teacher says, from where an earlier process left off.

    The loss of a step is T² KL(LLM ‖ proxy) + hidden_weight · mean over blocks of the hidden states' distance.

    Args:
        student: The proxy; changed.
        teacher: What the LLM says about `texts`.
        texts: What to train on, in the teacher's order.
        settings: The [heal] table.
        proxy: Identity of the proxy before training.
        pad: Padding token id.
        seed: Seed of the order of the texts.
        work: Directory with the state of the training.
        on_step: Called after each step with the steps done and its loss.

    Returns:
        The loss of every step.

    Raises:
        UsageError: the loss or its gradient is NaN or infinite, or `work` holds the state of another training.
        ArtifactError: the state is damaged.
    """
    parameters = student.parameters
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.0, weight_decay=0.0, fused=True)
    highest = settings.highest_rate
    description = {name: value for name, value in asdict(settings).items() if name not in _NOT_OF_THE_TRAINING}
    description |= {"learning_rate": highest, "proxy": proxy, "seed": seed, "trained": student.trained}
    losses = _restore(work / FILE, description, student, optimizer)
    a_pass = math.ceil(len(texts) / settings.batch_size)
    order: dict[int, list[list[int]]] = {}
    for step in range(len(losses), settings.steps):
        number, place = divmod(step, a_pass)
        if number not in order:
            generator = torch.Generator().manual_seed(derive_seed(seed, "heal", "order", number))
            order = {number: batches(texts, settings.batch_size, group_by_length=True, generator=generator)}
        chosen = order[number][place]
        batch = collate([texts[i] for i in chosen], pad)
        targets = teacher.targets(chosen, student.device)
        logits, hidden = student(batch["input_ids"], batch["attention_mask"])
        spoken = divergence(targets.tokens, logits, settings.temperature)
        apart = [hidden_distance(said, own) for said, own in zip(targets.hidden, hidden, strict=False)]
        felt = torch.stack(apart).mean() if apart else torch.zeros_like(spoken)
        (settings.temperature**2 * spoken + settings.hidden_weight * felt).backward()  # type: ignore[no-untyped-call]
        length = torch.nn.utils.clip_grad_norm_(list(parameters.values()), _MOST_GRADIENT)
        loss = Loss(spoken.item(), felt.item())
        if not math.isfinite(loss.divergence + loss.hidden + length.item()):
            (work / FILE).unlink(missing_ok=True)
            raise UsageError(
                f"healing: the loss became {loss.divergence + loss.hidden}, its gradient {length.item()}, at step "
                f"{step + 1} of {settings.steps}. Give a learning_rate below {highest}; what the LLM said is kept."
            )
        for group in optimizer.param_groups:
            group["lr"] = highest * rate(step, settings.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        if len(losses) % settings.save_every == 0 or len(losses) == settings.steps:
            _save(work / FILE, description, student, optimizer, losses)
        on_step(len(losses), loss)
    return losses


def _save(
    file: Path, description: dict[str, Any], student: Student, optimizer: torch.optim.Optimizer, losses: Sequence[Loss]
) -> None:
    tensors = {f"weight.{name}": parameter for name, parameter in student.parameters.items()}
    for name, parameter in student.parameters.items():
        tensors |= {f"{kind}.{name}": value for kind, value in optimizer.state[parameter].items()}
    table = torch.tensor([(loss.divergence, loss.hidden) for loss in losses], dtype=torch.float64)
    save_tensors(file, {**tensors, "losses": table}, metadata={_DESCRIPTION: json.dumps(description)})


def _restore(file: Path, description: dict[str, Any], student: Student, optimizer: torch.optim.Optimizer) -> list[Loss]:
    """Put the state of an earlier process back, if there is one, and return the losses of its steps."""
    if not file.is_file():
        return []
    try:
        check_same(parse_json(read_header(file).metadata[_DESCRIPTION], str(file)), description, file.parent)
        tensors = load_tensors(file)
        losses = [Loss(*pair) for pair in tensors.pop("losses").tolist()]
        with torch.no_grad():
            for name, parameter in student.parameters.items():
                parameter.copy_(tensors.pop(f"weight.{name}"))
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            parameter = student.parameters[name]
            optimizer.state[parameter][kind] = value.to(parameter.device, copy=True)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ArtifactError(f"{file} is damaged ({error}). Remove {file.parent} to begin anew.") from error
    return losses
