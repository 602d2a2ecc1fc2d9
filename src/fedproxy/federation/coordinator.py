"""The server's mind without hands: whom a round asks, which replies count, and what they make together.

It opens no socket, reads no file and imports no engine; `rounds.drive` moves it:

    coordinator.begin(available)             # opens a round
    order = coordinator.order(client)        # what each client of `coordinator.asked` gets
    coordinator.receive(sender, answer)      # one at a time; what cannot be used is recorded with its reason
    closed = coordinator.close()             # the merged adapter, or QuorumError
    scoring = coordinator.scoring(closed)    # with [federate] validation: the clients that score it
    coordinator.judge(closed, scoring)       # which round is the best, and whether it is the last

Replies are merged in the order of the clients' names, so the result does not depend on who was first.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from fedproxy.aggregation.analyse import conflict_of
from fedproxy.aggregation.merge import configured, merge_round
from fedproxy.aggregation.merge.clipping import CLIP_NORM
from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.aggregation.server_optimizer import server_optimizer
from fedproxy.aggregation.space import SPACES, trained
from fedproxy.aggregation.sums import LEAST
from fedproxy.config import Federate, seconds
from fedproxy.errors import ArtifactError, FederationError, SumsError
from fedproxy.federation.messages import (
    Answer,
    Closed,
    Kind,
    Order,
    Refusal,
    Reply,
    Score,
    Scored,
    Told,
    ask_size,
    order_size,
)
from fedproxy.federation.open_round import OpenRound, QuorumError, other_round
from fedproxy.federation.parcel import Parcel, wrap_adapter
from fedproxy.federation.reply_checks import (
    FAILURES_IN_A_ROW,
    check_training,
    checked_norm,
    failing,
    failures,
    outliers,
    strikes,
)
from fedproxy.federation.scoring import Scoring
from fedproxy.federation.secure.form import Form
from fedproxy.federation.validation import MODELS, Standing, as_scores, check_scores
from fedproxy.federation.wire import ENCODINGS
from fedproxy.privacy.client_noise import ClientNoise
from fedproxy.seeds import derive_seed
from fedproxy.tensors import Tensors, check_finite, digest

__all__ = ["Closed", "Coordinator", "Order", "QuorumError", "Refusal", "Reply"]


class Coordinator:
    """The rounds of one federation as a state machine; `adapter` is φ after the last complete round.

    Args:
        clients: Names of the clients, the roster.
        adapter: φ of the next round: the fresh adapter, or that of the last complete round.
        settings: The [federate] table.
        seed: The experiment's seed; whom a round asks, and what a merge rule draws, depend on it and the round.
        conflict: Conflict of the last complete round; none before the first.
        server_state: State of the server optimizer after the last complete round; none before the first.
        state: The server's state of the regulariser after the last complete round; none before the first.
        records: The records of the complete rounds, in order.
        start: The adapter that the first round begins with; `adapter` itself if none.
        ranks: Rank of the adapter of each client that has not the global adapter's.
    """

    def __init__(
        self,
        clients: Collection[str],
        adapter: Tensors,
        settings: Federate,
        *,
        seed: int = 0,
        conflict: Tensors | None = None,
        server_state: Tensors | None = None,
        state: Tensors | None = None,
        records: Sequence[Mapping[str, Any]] = (),
        start: Tensors | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        self.clients = tuple(sorted(clients))
        self.adapter, self.settings = adapter, settings
        self.completed = len(records)
        self.strikes, self.failures = strikes(records), failures(records)
        self._seed, self._conflict, self._server_state, self._state = seed, conflict, server_state, state
        self._regulariser, self._wire = REGULARISERS.choose(settings.regulariser), ENCODINGS.choose(settings.wire)
        self._rule, self._rule_options = configured(settings.merge, settings.merge_options)
        self._space, self._ranks = SPACES.choose(settings.space), ranks or {}
        self._form = Form.of(settings) if settings.secure else None
        self._noise = ClientNoise.of(settings)
        self._digest = digest(adapter if start is None else start) if settings.secure else ""
        self._start = trained(self._space, adapter if start is None else start)
        self._optimizer, self._options = server_optimizer(settings.server_optimizer, settings.server_options)
        last: Mapping[str, Any] = records[-1]["analysis"] if records else {"clients": 0}
        self._voters = int(last["clients"])
        self._retention = self._retained(last.get("names", ()), last.get("heterogeneity", ()))
        self._counted = {name: int(record["round"]) for record in records for name in record.get("clients", ())}
        self._attempts: list[dict[str, Any]] = []
        self._open: OpenRound | None = None
        self._records, self._untuned = list(records), _untuned(records)
        self._standing = Standing.of(self._records, settings.patience_rounds)

    @property
    def done(self) -> bool:
        """Whether all rounds are complete, or no further one is to be expected to be better."""
        return self.completed >= self.settings.rounds or self._standing.stop

    @property
    def kept(self) -> int:
        """The round whose adapter is the result so far: the last, or the best as [federate] keep says."""
        best = self._standing.best if self.settings.keep == "best" else None
        return self.completed if best is None else best

    @property
    def eligible(self) -> frozenset[str]:
        """The clients that may be asked: those with fewer strikes than the limit, which have not failed for ever."""
        least = self.settings.strikes
        fit = (name for name in self.clients if self.failures[name] < FAILURES_IN_A_ROW)
        return frozenset(name for name in fit if self.strikes[name] < least)

    @property
    def target(self) -> int:
        """Clients that a full round asks: a share of those that may be asked, and no fewer than a round begins with."""
        return max(_share(self.settings.participation, len(self.eligible)), self.least)

    @property
    def least(self) -> int:
        """Clients that a round begins with, at least: a quorum, and as many as a secure sum has."""
        return max(self.needed, self._fewest)

    @property
    def _fewest(self) -> int:
        """The lowest quorum that has an effect."""
        return LEAST if self._form else 1

    @property
    def needed(self) -> int:
        """Valid replies that the next round needs. A share counts what a full round asks, not only who is there."""
        if isinstance(self.settings.quorum, int):
            return self.settings.quorum
        return _share(self.settings.quorum, _share(self.settings.participation, len(self.eligible)))

    @property
    def asked(self) -> tuple[str, ...]:
        """The clients that the open round asks now, sorted."""
        return tuple(self._current().now)

    def order(self, client: str) -> Order:
        """What a client of `asked` gets now; clients who get the same share one object."""
        return self._current().now[client]

    @property
    def trains(self) -> bool:
        """Whether the open round now asks for updates; else for a step of secure sums."""
        sums = self._current().sums
        return sums is None or sums.trains

    def advance(self) -> bool:
        """Go on to the next step of the round's secure sums.

        Returns:
            Whether there is one; else the round can be closed.

        Raises:
            QuorumError: too few clients are left.
        """
        state = self._current()
        if state.sums is None:
            return False
        state.gone |= state.silent
        try:
            if not state.sums.advance():
                return False
        except SumsError as error:
            self._open = None
            self.failures.update(failing(state.record()))
            raise self._missed(state, str(error)) from error
        state.ask(state.sums.orders())
        return True

    def _current(self) -> OpenRound:
        if self._open is None:
            raise RuntimeError("no round is open")
        return self._open

    def admit(self, clients: Collection[str]) -> None:
        """Add to the roster who is not in it yet; they can be asked from the next round on."""
        self.clients = tuple(sorted({*self.clients, *clients}))

    def begin(self, available: Collection[str]) -> None:
        """Open the next round, or the last one again if it had no quorum.

        Which of the available clients are asked depends on seed, round and attempt alone: they are ranked by a hash,
        so that another client's coming or going does not shuffle the rest.

        Args:
            available: Names of those who can take part now.

        Raises:
            FederationError: they are fewer than the round needs, or too many for secure sums.
        """
        if self._open is not None or self.done:
            raise RuntimeError("begin: a round is open, or all are complete")
        number, attempt = self.completed + 1, len(self._attempts)
        present = self.eligible.intersection(available)
        if len(present) < self.least:
            raise FederationError(self.too_few(present))
        asked = self.chosen(present, number, attempt)
        everyone = len(asked) == len(self.eligible)
        state = OpenRound(number, self._orders(number, asked), asked, self.needed, everyone)
        if self._form is not None:
            from fedproxy.federation.secure.round import SecureRound  # needs the extra federation

            state.sums = SecureRound(state.orders, self._form, start=self._digest, attempt=attempt)
        state.ask(state.orders if state.sums is None else state.sums.orders())
        self._open = state

    def chosen(self, present: Collection[str], number: int, attempt: int = 0) -> tuple[str, ...]:
        """Which of the clients that are there a round asks, sorted.

        Args:
            present: Their names.
            number: The round.
            attempt: How often it was begun before.
        """
        ranked = sorted(present, key=lambda name: derive_seed(self._seed, "participation", number, attempt, name))
        return tuple(sorted(ranked[: self.target]))

    def _orders(self, number: int, asked: Collection[str]) -> dict[str, Order]:
        """The orders of a round, one object for all clients of one rank, retention and memory."""
        plain: dict[tuple[int | None, float], Order] = {}
        orders: dict[tuple[int | None, float, int, bool], Order] = {}
        made = {}
        for name in asked:
            rank, share, since = self._ranks.get(name), self._share(name), self._since(name)
            untuned = self.settings.validation > 0 and name not in self._untuned
            if (rank, share) not in plain:
                plain[rank, share] = self._order(number, rank, share)
            own = replace(plain[rank, share], since=since, untuned=untuned)
            made[name] = orders.setdefault((rank, share, since, untuned), own)
        return made

    def _since(self, client: str) -> int:
        """The last round that counted the client's update, where the client has something to remember."""
        remembers = self._wire.loses or self._regulariser.carried or self.settings.alone
        return self._counted.get(client, 0) if remembers else 0

    def _share(self, client: str) -> float:
        """The share that a client sends: its retention (Eq. 10) in the round before, at first the highest."""
        if not self._wire.by_share:
            return 1.0
        return self._retention[client] if client in self._retention else self._rule.first(self._rule_options)

    def _retained(self, names: Sequence[str], heterogeneities: Sequence[float]) -> dict[str, float]:
        """The retention of each client, Eq. 10, whatever the merge rule makes of it."""
        if not heterogeneities:
            return {}
        return dict(zip(names, self._rule.retained(heterogeneities, self._rule_options), strict=True))

    def _travelling(self, number: int, rank: int | None) -> tuple[Parcel | None, Tensors]:
        """The adapter with which a round begins, as it travels to clients of a rank and as they read it."""
        adapter: Tensors = trained(self._space, self.adapter)
        if rank is not None and self._space.for_rank is not None:
            adapter = self._space.for_rank(adapter, rank)
        seed = derive_seed(self._seed, "wire-down", number)
        return wrap_adapter(adapter, self._start, self.settings.wire_down, seed=seed)

    def _order(self, number: int, rank: int | None, share: float) -> Order:
        parcel, adapter = self._travelling(number, rank)
        conflict = self._conflict if self._regulariser.conflict else None
        if conflict and rank is not None:
            conflict = {name: conflict[name][*map(slice, tensor.shape)] for name, tensor in adapter.items()}
        voters = self._voters if conflict else 0
        return Order(number, adapter, conflict, voters, self._state, share, parcel)

    def too_few(self, present: Collection[str]) -> str:
        """The sentence that says who is there and how many the next round needs."""
        struck, missing = sorted(set(self.clients) - self.eligible), sorted(self.eligible.difference(present))
        remedies = ["start the missing clients"] * bool(missing)
        remedies += [f"lower [federate] quorum to {len(present)}"] * (len(present) >= self._fewest)
        advice = f"{', or '.join(remedies)}, and go on with --resume." if remedies else ""
        return (
            f"Round {self.completed + 1} needs {self.least} clients (quorum {self.settings.quorum}), "
            f"there are {len(present)}: {', '.join(sorted(present)) or 'none'}. "
            f"Missing: {', '.join(missing) or 'none'}."
            + f" No longer asked, after {self.settings.strikes} invalid replies or {FAILURES_IN_A_ROW} times in a row "
            f"without one that counts: {', '.join(struck)}."
            * bool(struck)
            + f" With secure sums no round has fewer than {LEAST}." * (self.least > self.needed)
            + f" {advice[:1].upper()}{advice[1:]}".rstrip()
        )

    def receive(self, sender: str, answer: Answer) -> str | None:
        """Take a client's answer. The first to a round counts; what comes late or twice is recorded and left out.

        Args:
            sender: The client that sent it, as the transport knows it; the strikes are its own, whatever name the
                answer claims.
            answer: What it sent.

        Returns:
            None if it is a reply that counts, else the reason why not.
        """
        state = self._current()
        if sender not in self.clients:
            return state.faults.add(sender, "invalid", f"{sender} takes no part in this federation")
        if late := state.late(sender, answer):
            return state.faults.add(sender, "late", late)
        deadline = self.settings.deadline
        if deadline and isinstance(answer, Reply) and answer.seconds > seconds(deadline):
            state.overdue.add(sender)
            return state.faults.add(sender, "late", f"it took {answer.seconds:.0f} s, the deadline is {deadline}")
        state.answered.add(sender)
        if isinstance(answer, Refusal):
            return self._fault(state, sender, answer.kind, answer.reason)
        if isinstance(answer, Scored):
            return self._fault(state, sender, "invalid", "it is a score, an update was asked for")
        if answer.client != sender:
            return self._fault(state, sender, "invalid", f"it came under the name {answer.client!r}")
        if answer.round != state.round:
            return self._fault(state, sender, "invalid", other_round(answer.round, state.round))
        try:
            self._take(state, sender, answer)
        except (ArtifactError, SumsError) as error:
            return self._fault(state, sender, "invalid", str(error))
        return None

    def _take(self, state: OpenRound, sender: str, answer: Reply | Told) -> None:
        """Check an answer that was awaited, and take it.

        Raises:
            ArtifactError, SumsError: it cannot be used.
        """
        size = answer.size if isinstance(answer, Reply) else ask_size(answer)
        if isinstance(answer, Told):
            if state.sums is None or state.sums.trains:
                raise ArtifactError("it is of secure sums, an update was asked for")
            state.sums.receive(sender, answer)
        elif state.sums is not None and not state.sums.trains:
            raise ArtifactError("it is an update, a step of secure sums was asked for")
        else:
            given, federate, carried = state.orders[sender], self.settings, self._regulariser.carried
            check_training(answer, carried)
            check_scores(answer, wanted=federate.validation > 0, untuned=given.untuned, alone=federate.alone)
            if state.sums is not None:
                state.sums.receive(sender, answer)
                answer = replace(answer, update={})  # the words are in the sum
            else:
                state.norms[sender] = self._norm(given.adapter, answer)
            state.replies[sender] = answer
        state.up[sender] += size

    def _norm(self, given: Tensors, reply: Reply) -> float:
        norm = checked_norm(reply.update, given, reply.client)
        if not self._space.lasting:  # what is merged is computed of the update, and may overflow by itself
            check_finite(self._space.vector(given, reply.update), reply.client)
        limit = self.settings.max_norm
        if limit is not None and norm > limit:
            raise ArtifactError(f"its norm {norm:.4g} exceeds max_norm {limit:g}")
        return norm

    def _fault(self, state: OpenRound, client: str, kind: Kind, reason: str) -> str:
        if kind == "invalid":
            self.strikes[client] += 1
        return state.faults.add(client, kind, reason)

    def close(self) -> Closed:
        """Leave out updates of outlying norm, merge the rest and end the round.

        Raises:
            QuorumError: fewer valid replies than needed.
        """
        state, self._open = self._current(), None
        odd = outliers(state.norms, self.settings.max_norm_ratio)
        if carried := self._regulariser.carried:
            odd = carried.odd(state.replies, self.settings.max_norm_ratio) | odd
        for name, reason in odd.items():
            del state.replies[name]
            self._fault(state, name, "invalid", reason)
        self.failures.update(failing(state.record()))
        if state.sums is not None:
            state.replies = {name: state.replies[name] for name in state.sums.clients}
            state.gone -= state.replies.keys()  # gone only after the sum had its words
            state.answered |= state.replies.keys()
        if len(state.replies) < state.needed:
            raise self._missed(state)
        replies = [state.replies[name] for name in sorted(state.replies)]
        merged, levels, analysis = self._merged(state, replies)
        update, server_state = self._optimizer.step(merged, self._server_state, self._options)
        adapter = self._space.apply(self.adapter, update)
        conflict = conflict_of(self._space.levels(adapter, levels), len(replies))
        carried_on = carried.server(self._state, replies, len(self.clients)) if carried else {}
        scores = {reply.client: self._scored(reply) for reply in replies}
        record = state.closed(replies, scores, self._attempts, analysis)
        if self._noise is not None:
            record["privacy"] = {"epsilon": self._noise.spent(state.round), "noise": self._noise.multiplier}
        closed = Closed(state.round, adapter, conflict, server_state, carried_on, record)
        self.adapter, self._conflict, self._voters = adapter, conflict or None, len(replies)
        self._retention = self._retained(analysis["names"], analysis["heterogeneity"])
        self._server_state, self._state = server_state, carried_on or None
        self._counted |= dict.fromkeys(analysis["names"], state.round)
        for name in analysis["names"]:
            del self.failures[name]
        self.completed, self._attempts = closed.round, []
        self._records.append(record)
        return closed

    def _merged(
        self, state: OpenRound, replies: Sequence[Reply]
    ) -> tuple[dict[str, torch.Tensor], Tensors, dict[str, Any]]:
        """The merged update, the disagreement at its coordinates (empty if none is told) and the round's analysis."""
        if state.sums is not None:
            summed = state.sums.summed()
            return summed.merged, summed.levels, summed.analysis
        vectors = [self._space.vector(state.orders[reply.client].adapter, reply.update) for reply in replies]
        how: dict[str, Any] = {
            "rows": [reply.rows for reply in replies],
            "names": [reply.client for reply in replies],
            **self.settings.merge_options,
            **({} if self._noise is None else {CLIP_NORM: self._noise.clip}),
        }
        merged, levels, analysis = merge_round(vectors, self.settings.merge, **how)
        if self._noise is not None:
            return self._noise.added(merged, len(vectors)), {}, analysis.as_dict()
        return merged, levels, analysis.as_dict()

    def scoring(self, closed: Closed) -> Scoring | None:
        """Let the clients whose replies counted and brought scores score the round's adapter; none without validation.

        It goes out as it will in the next round, so with a lossy `wire_down` as clients read it there.
        """
        if not self.settings.validation:
            return None
        clients, orders = closed.record["clients"], dict[int | None, Order]()
        made = {}
        for name in (name for name, client in clients.items() if "validation" in client):
            if (rank := self._ranks.get(name)) not in orders:
                parcel, adapter = self._travelling(closed.round + 1, rank)
                orders[rank] = Order(closed.round, adapter, parcel=parcel, trains=False)
            made[name] = orders[rank]
            clients[name]["bytes_down"] += order_size(made[name])
        return Scoring(closed, made)

    def judge(self, closed: Closed, scoring: Scoring) -> None:
        """Take the scores into the round's record, and with them the standing of all rounds."""
        told = scoring.record()
        closed.record["validation"] = told
        self.strikes.update(fault["client"] for fault in told["faults"] if fault["kind"] == "invalid")
        self._untuned = _untuned(self._records)
        self._standing = Standing.of(self._records, self.settings.patience_rounds)
        told |= {"best_round": self._standing.best, "stop": self._standing.stop}

    def _missed(self, state: OpenRound, why: str = "") -> QuorumError:
        self._attempts.append(state.record())
        return state.miss(self.settings.quorum, why)

    def _scored(self, reply: Reply) -> dict[str, Any]:
        """The scores of a reply for its record, with that of the untuned proxy, which is measured once."""
        found, known = dict(reply.validation), self._untuned.get(reply.client)
        if found and known is not None and known.rows == found["own"].rows:
            found["untuned"] = known
        return {"validation": {name: asdict(found[name]) for name in MODELS if name in found}} if found else {}


def _untuned(records: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """The score that each client gave the untuned proxy, unless the rows that it scores are others now."""
    found: dict[str, Score] = {}
    for name, client in ((name, one) for record in records for name, one in record.get("clients", {}).items()):
        scores = as_scores(client.get("validation", {}))
        if "untuned" in scores:
            found[name] = scores["untuned"]
        elif scores:
            found.pop(name, None)
    return found


def _share(share: float, count: int) -> int:
    """The share of `count`, rounded up, at least 1; a product that is whole but for float rounding counts as whole."""
    return max(1, math.ceil(share * count - 1e-9))
