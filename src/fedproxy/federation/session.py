"""A client that stays warm: proxy, adapter and encoded rows are made ready once and answer every round's order."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedproxy.config import Federate
from fedproxy.errors import FederationError, FedproxyError
from fedproxy.federation.client import answer
from fedproxy.federation.messages import Refusal
from fedproxy.federation.offer import Limits, Offer, check_offer
from fedproxy.federation.protocol import decode_order, encode_reply, order_limit
from fedproxy.models.checkpoints import load_tokenizer
from fedproxy.models.encoding import Encoded, encode
from fedproxy.models.lora import adapter_state
from fedproxy.models.trainable import load_trainable
from fedproxy.models.training import optimizer_steps

OnStep = Callable[[int, int, int, float], None]
"""Told the round, the step, the number of steps and the loss."""


class Session:
    """The training of one proxy in this process, for one client or, in a simulation, for several.

    Args:
        proxy: The proxy's directory.
        offer: What the server offers: settings of the training, the seed.
        limits: What the client allows.
        trust_remote_code: Let the proxy's own Python code run.

    Raises:
        ArtifactError: the proxy cannot be used.
    """

    def __init__(
        self, proxy: Path, offer: Offer, limits: Limits | None = None, *, trust_remote_code: bool = False
    ) -> None:
        self._offer, self._limits = offer, limits or Limits()
        self._tokenizer = load_tokenizer(proxy, trust_remote_code=trust_remote_code)
        self._model = load_trainable(proxy, offer.train, seed=offer.seed, trust_remote_code=trust_remote_code)
        self._federate = Federate(
            rounds=offer.rounds, regulariser=offer.regulariser, regulariser_strength=offer.regulariser_strength
        )
        self._examples: dict[str, list[Encoded]] = {}
        self.order_limit = order_limit(adapter_state(self._model))

    def knows(self, client: str) -> bool:
        """Whether the rows of `client` are there."""
        return client in self._examples

    def add(self, client: str, rows: Sequence[Mapping[str, Any]]) -> int:
        """Encode the rows of a client.

        Returns:
            Optimizer steps that a round takes.

        Raises:
            ArtifactError, UsageError: the rows cannot be used.
            FederationError: the client's limits forbid what the server offers.
        """
        settings = self._offer.train
        examples = encode(
            rows, self._tokenizer, max_length=settings.max_length, completion_only=settings.completion_only_loss
        )
        steps = optimizer_steps(len(examples), settings)
        if reason := check_offer(self._offer, self._limits, steps=steps):
            raise FederationError(f"{client} declines: {reason}.")
        self._examples[client] = examples
        return steps

    def answer(self, client: str, data: bytes, on_step: OnStep | None = None) -> bytes:
        """Train as the order in `data` says; whatever goes wrong becomes a refusal that says so.

        Args:
            client: For whom; its rows must have been added.
            data: An order from `protocol.encode_order`.
            on_step: Told every optimizer step.

        Returns:
            The bytes of the reply or refusal.
        """
        number = 1
        try:
            order = decode_order(data)
            number = order.round
            if number > self._offer.rounds:
                raise FederationError(f"round {number} was ordered of {self._offer.rounds} that were offered.")
            return encode_reply(
                answer(
                    order,
                    client,
                    self._model,
                    self._examples[client],
                    train_settings=self._offer.train,
                    federate_settings=self._federate,
                    pad=self._tokenizer.pad_token_id,
                    seed=self._offer.seed,
                    on_step=on_step and (lambda step, steps, loss: on_step(number, step, steps, loss)),
                )
            )
        except FedproxyError as error:
            return encode_reply(Refusal(client, number, str(error)))
