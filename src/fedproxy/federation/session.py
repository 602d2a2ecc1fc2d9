"""A client that stays warm: proxy, adapter and encoded rows are made ready once and answer every round's orders."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fedproxy.aggregation.space import SPACES, trained
from fedproxy.errors import ArtifactError, FederationError, FedproxyError, ResourceError, SumsError, explained, told
from fedproxy.federation.client import answer, take, train_alone
from fedproxy.federation.client_rows import scored_rows
from fedproxy.federation.client_state import ClientState
from fedproxy.federation.messages import Answer, Ask, Order, Refusal, Reply, Score, Scored, Told
from fedproxy.federation.offer import DeclinedError, Limits, Offer, check_offer
from fedproxy.federation.protocol import decode_order, encode_reply, order_limit
from fedproxy.federation.secure.form import Form
from fedproxy.federation.wire import ENCODINGS
from fedproxy.layer_map import split_name, trained_blocks
from fedproxy.models.checkpoints import Tokenizer, load_tokenizer, padding
from fedproxy.models.encoding import Encoded, training_examples
from fedproxy.models.families import blocks, readable
from fedproxy.models.lora import AdaptedModel, adapter_config, adapter_state, train_only, without_adapter
from fedproxy.models.trainable import load_trainable
from fedproxy.models.training import optimizer_steps
from fedproxy.models.validating import BrokenModelError, Validation, measure
from fedproxy.privacy.plan import Plan
from fedproxy.privacy.releases import OverspentError, Purse, Releases
from fedproxy.tensors import Tensors, digest

if TYPE_CHECKING:
    from fedproxy.federation.secure.client import SecureClient
    from fedproxy.privacy.sums.identity import Identity

PRIVATE = "private"
"""Of what a client remembers of a run: the folder of its private trainings."""
_DECLINES = (DeclinedError, OverspentError, SumsError)
OnStep = Callable[[int, int, int, float], None]
"""Told the round, the step, the number of steps and the loss."""
OnGlobal = Callable[[int, Tensors], None]
"""Told a round that is over, and the global adapter after it, as far as it is trained."""


class Session:
    """The training of one proxy in this process, for one client or, where all are on one machine, for several.

    Args:
        model: The proxy with its fresh adapter; the adapter's values are overwritten.
        tokenizer: Its tokenizer.
        offer: What the server offers: settings of the training, the seed.
        limits: What the client allows; none where server and clients are one.
        state: Folder in which clients keep what they remember from round to round.

    Attributes:
        orders: How often each round was ordered of a client: (client, "train", "score" or a step of secure sums,
            round) → times.
        identities: The registered keys of each client with which it takes part in secure sums.
        on_global: Told the global adapter that an order brings; none if nobody wants it.
        purse: Who pays for private trainings beside the run's own budget; nobody if none.
        fresh: The adapter's first values; what is not trained keeps them.

    Raises:
        FederationError: the server builds on first values of the adapter that are not those drawn here.
    """

    def __init__(
        self, model: AdaptedModel, tokenizer: Tokenizer, offer: Offer, limits: Limits | None = None, *, state: Path
    ) -> None:
        self._model, self._tokenizer, self._offer, self._state = model, tokenizer, offer, state
        self._limits = limits
        self.orders: Counter[tuple[str, str, int]] = Counter()
        self.on_global: OnGlobal | None = None
        base: Any = model.get_base_model()
        self.longest = readable(base.config, offer.train.max_length)
        owned, chosen = trained_blocks(offer.train.blocks, len(blocks(base))), SPACES.choose(offer.federate.space)
        fresh = {name: value for name, value in adapter_state(model).items() if split_name(name)[1] in owned}
        train_only(model, lambda name: name in fresh and chosen.trains(name))
        self.fresh, self._start = fresh, trained(chosen, fresh)
        if (len(self._start) < len(fresh) or not ENCODINGS.choose(offer.federate.wire_down).plain) and digest(
            fresh
        ) != offer.start:
            raise FederationError(
                "The adapter's first values are others here than at the server, which builds on them. Install "
                "the server's version of torch, or ask for wire_down = fp32 and another space than frozen-a."
            )
        self._examples: dict[str, Sequence[Encoded]] = {}
        self._validations: dict[str, Validation] = {}
        self._plans: dict[str, Plan] = {}
        self.purse: Purse | None = None
        self.identities: Mapping[str, Identity] = {}
        self._sums: dict[str, SecureClient] = {}
        self.order_limit = order_limit(self._start, offer.federate.wire_down, secure=offer.federate.secure)

    @staticmethod
    def open(
        proxy: Path, offer: Offer, limits: Limits | None = None, *, state: Path, trust_remote_code: bool = False
    ) -> "Session":
        """The session of a proxy that lies in a directory; the arguments are those of `Session`.

        Raises:
            ArtifactError: the proxy cannot be used.
            FederationError: as of `Session`.
        """
        tokenizer = load_tokenizer(proxy, trust_remote_code=trust_remote_code)
        model = load_trainable(proxy, offer.train, seed=offer.seed, trust_remote_code=trust_remote_code)
        return Session(model, tokenizer, offer, limits, state=state)

    @property
    def config(self) -> dict[str, Any]:
        """PEFT's configuration of the adapter."""
        return adapter_config(self._model)

    def knows(self, client: str) -> bool:
        """Whether the rows of `client` are there."""
        return client in self._examples

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[Encoded]:
        """Rows as this proxy is to read them; errors as of `encode`."""
        return training_examples(rows, self._tokenizer, self._offer.train, self.longest)

    def take_rows(self, client: str, rows: Sequence[Mapping[str, Any]], held: Sequence[Mapping[str, Any]]) -> int:
        """Encode a client's rows to train on and to score on, and take them; see `add` and `scored_rows`."""
        examples, train = self.encode(rows), self._offer.train
        validation = scored_rows(rows, held, len(examples), self._tokenizer, train, self.longest) if held else None
        return self.add(client, examples, validation)

    def add(self, client: str, examples: Sequence[Encoded], validation: Validation | None = None) -> int:
        """Take a client's encoded rows, and those that it scores on; without, it gives no scores.

        Returns:
            Optimizer steps that a round takes.

        Raises:
            DeclinedError: the client's limits forbid what the server offers.
            UsageError: as of `Plan.of`.
        """
        steps = optimizer_steps(len(examples), self._offer.train)
        if self._limits is not None:
            check_offer(self._offer, self._limits, rows=len(examples), steps=steps)
        self._examples[client] = examples
        train, rounds = self._offer.train, self._offer.federate.rounds
        if train.privacy is not None:
            self._plans[client] = Plan.of(train.privacy, train, rows=len(examples), steps=steps, rounds=rounds)
        if validation is not None:
            self._validations[client] = validation
        return steps

    def respond(self, client: str, order: Order, on_step: OnStep | None = None) -> Reply | Scored | Told:
        """Answer an order; the arguments, and what is raised, are those of `train`, `score` and `sum`."""
        if order.kind == "sum":
            return self.sum(client, order)
        return self.train(client, order, on_step) if order.trains else self.score(client, order)

    def sum(self, client: str, order: Order) -> Told:
        """Take part in a step of the round's secure sums, other than the training.

        Args:
            client: For whom; its rows must have been added.
            order: The order.

        Raises:
            FederationError, SumsError: the order is none of this federation, or would give an update away.
            DeclinedError: the step was ordered too often.
            ArtifactError: what the client noted is damaged.
            ResourceError: the disk is full.
        """
        self._begin(client, order)
        return self._secure(client).told(order, _asked(order))

    def _secure(self, client: str) -> "SecureClient":
        """The client's part in the secure sums of the run."""
        if client not in self._sums:
            from fedproxy.federation.secure.client import SecureClient  # needs the extra federation

            if client not in self.identities:
                raise DeclinedError("this client has no keys for secure sums.")
            form, folder, rows = Form.of(self._offer.federate), self._state / client, len(self._examples[client])
            self._sums[client] = SecureClient(self.identities[client], form, self._offer.start, rows, folder)
        return self._sums[client]

    def _begin(self, client: str, order: Order) -> None:
        """Check that an order is one of this federation, and that this client was not asked too often.

        Raises:
            FederationError: it is not.
            DeclinedError: it was.
        """
        number, kind = order.round, order.kind if order.kind != "sum" else f"{_asked(order).step} {_asked(order).label}"
        if order.kind != "score" and (order.ask is not None) is not self._offer.federate.secure:
            wanted = "with" if self._offer.federate.secure else "without"
            raise FederationError(f"round {number} is not {wanted} secure sums, as it was offered.")
        if number > self._offer.federate.rounds:
            raise FederationError(f"round {number} was ordered of {self._offer.federate.rounds} that were offered.")
        if order.kind != "sum" and _shapes(order.adapter) != _shapes(self._start):
            raise FederationError("The order's adapter is not one of the proxy that was handed out.")
        self.orders[client, kind, number] += 1
        limits, times = self._limits, self.orders[client, kind, number]
        if limits is not None and times > 1 + limits.max_repeats:
            raise DeclinedError(
                f"round {number} was ordered {times} times, this client allows {limits.max_repeats} repeats at most "
                "(max_repeats)."
            )
        made = number - 1 if order.trains else number
        if self.on_global is not None and made and order.kind != "sum":
            self.on_global(made, order.adapter)

    def score(self, client: str, order: Order) -> Scored:
        """Score the adapter of an order on the client's validation rows.

        Args:
            client: For whom; its rows must have been added.
            order: The order.

        Raises:
            FederationError: the order is none of this federation.
            DeclinedError: this client gives no scores, or the round was ordered too often, or takes longer than the
                client allows.
            BrokenModelError: the model's loss means nothing.
        """
        self._begin(client, order)
        if client not in self._validations:
            raise DeclinedError("this client gives no scores.")
        in_time = self._clock(order.round)
        take(order.adapter, self._model)
        return Scored(client, order.round, self._measure(client, in_time))

    def _clock(self, number: int) -> Callable[[int, int, str], None]:
        """What ends the work on an order of a round that takes longer than the client allows, from now on.

        Returns:
            To be told how much of how much is done, and what, as often as it may end there.
        """
        limits, began = self._limits, time.monotonic()

        def in_time(done: int, whole: int, what: str) -> None:
            spent = time.monotonic() - began
            if limits is not None and done < whole and spent > limits.max_time:
                raise DeclinedError(
                    f"round {number} took {spent:.0f} s for {done} of {whole} {what}, this client allows "
                    f"{limits.max_time:g} s at most (max_time)."
                )

        return in_time

    def _measure(self, client: str, in_time: Callable[[int, int, str], None]) -> Score:
        validation, size = self._validations[client], self._offer.train.batch_size
        loss, accuracy = measure(
            self._model,
            validation,
            pad=padding(self._tokenizer),
            batch_size=size,
            on_read=lambda read, texts: in_time(read, texts, "texts to score"),
        )
        return Score(loss, validation.rows, accuracy)

    def _scores(self, client: str, order: Order, in_time: Callable[[int, int, str], None]) -> dict[str, Score]:
        """What a client that has trained says of its own update, of the untuned proxy, and of training alone."""
        if client not in self._validations or not self._offer.federate.validation:
            return {}
        found = {"own": self._measure(client, in_time)}
        if order.untuned:
            with without_adapter(self._model):
                found["untuned"] = self._measure(client, in_time)
        if self._offer.federate.alone and train_alone(
            order,
            client,
            self._model,
            self._examples[client],
            start=self._start,
            train_settings=self._offer.train,
            pad=padding(self._tokenizer),
            seed=self._offer.seed,
            state=ClientState(self._state / client / "alone"),
            on_step=lambda step, steps, loss: in_time(step, steps, "steps alone"),
        ):
            with contextlib.suppress(BrokenModelError):
                found["alone"] = self._measure(client, in_time)
        return found

    def train(self, client: str, order: Order, on_step: OnStep | None = None) -> Reply:
        """Train as an order says, see `client.answer`, and score what came of it.

        Args:
            client: For whom; its rows must have been added.
            order: The order.
            on_step: Told every optimizer step.

        Raises:
            FederationError: the order is none of this federation.
            DeclinedError: the round was ordered too often, or takes longer than the client allows.
            OverspentError: the privacy budget forbids it.
            DivergedError, BrokenModelError: the training diverged.
            ArtifactError: what the client remembers is damaged.
            ResourceError: the disk is full, or memory does not suffice.
        """
        self._begin(client, order)
        number, in_time = order.round, self._clock(order.round)

        def stepped(step: int, steps: int, loss: float) -> None:
            in_time(step, steps, "steps")
            if on_step is not None:
                on_step(number, step, steps, loss)

        reply = answer(
            order,
            client,
            self._model,
            self._examples[client],
            train_settings=self._offer.train,
            federate_settings=self._offer.federate,
            pad=padding(self._tokenizer),
            seed=self._offer.seed,
            state=ClientState(self._state / client),
            on_step=stepped,
            releases=self._releases(client),
        )
        if order.ask is not None:
            reply = self._secure(client).masked(order, order.ask, reply)
        return replace(reply, validation=self._scores(client, order, in_time))

    def _releases(self, client: str) -> Releases | None:
        """What a client gave away so far in this run, if it trains with privacy."""
        plan = self._plans.get(client)
        return None if plan is None else Releases(self._state / client / PRIVATE, plan, self.purse)

    def answer(
        self, client: str, data: bytes, on_step: OnStep | None = None
    ) -> tuple[bytes, Answer, FedproxyError | None]:
        """Train or score as the order in `data` says; whatever goes wrong becomes a refusal that says so.

        Args:
            client: For whom; its rows must have been added.
            data: An order from `protocol.encode_order`.
            on_step: Told every optimizer step.

        Returns:
            The bytes of the reply or score, it itself, and none; or those of the refusal, which hold no path of this
            machine, the refusal, and what went wrong in full. That is a `FederationError` if the order cannot be used;
            the other errors with exit codes of their own are about this side's state, disk or memory.
        """
        number = 1
        try:
            order = self._order(data)
            number = order.round
            said = self.respond(client, order, on_step)
            return encode_reply(said), said, None
        except FedproxyError as error:
            fault = error
        except (OSError, MemoryError, RuntimeError) as error:
            fault = explained(error)
            if not isinstance(fault, ResourceError):
                raise
        kind: Literal["declined", "failed"] = "declined" if isinstance(fault, _DECLINES) else "failed"
        refusal = Refusal(client, number, told(fault), kind)
        return encode_reply(refusal), refusal, fault

    def _order(self, data: bytes) -> Order:
        """The order in `data`.

        Raises:
            FederationError: it is damaged.
            ResourceError: there is no room for it in the temporary folder.
        """
        try:
            return decode_order(data, self._start, self._offer.federate.wire_down)
        except ArtifactError as error:
            raise FederationError(str(error)) from error


def _asked(order: Order) -> Ask:
    if order.ask is None:
        raise FederationError("the order asks for no step of secure sums.")
    return order.ask


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
