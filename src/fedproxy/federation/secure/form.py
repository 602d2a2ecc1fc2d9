"""What both sides of secure sums know of a federation: which sums there are, and how many clients make one."""

import json
import math
from dataclasses import dataclass

from fedproxy.aggregation.merge import RULES, configured
from fedproxy.aggregation.merge.clipping import CLIP_NORM
from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.aggregation.space import SPACES
from fedproxy.aggregation.sums import LEAST, weight
from fedproxy.config import Federate
from fedproxy.errors import SumsError, UsageError
from fedproxy.federation.messages import Ask
from fedproxy.federation.secure.asks import MOST_MEMBERS
from fedproxy.federation.wire import ENCODINGS
from fedproxy.privacy.client_noise import REACH, ClientNoise

VALUES, POSITIVE = "values", "positive"
"""The two sums: of the weighted values, and of the positive ones among them at contested coordinates."""
_TRIMMING = {"r0", "delta"}
BOUND = 64.0
"""Largest norm of an update, unless [federate] max_norm says another."""


@dataclass(frozen=True)
class Form:
    """What is summed in a federation.

    Attributes:
        elects: Whether the rule merges, at each coordinate, the clients of an elected sign alone. That takes two sums.
        rho: How many times the other sign's clients a sign needs to be elected.
        by_rows: Whether a client counts by its rows.
        signs: Whether the first sum counts signs, before the values.
        bound: Largest norm of an update; a client shortens its own to it.
        noise: Of [federate.privacy]; none without.
    """

    elects: bool
    rho: float
    by_rows: bool
    signs: bool
    bound: float
    noise: ClientNoise | None = None

    @staticmethod
    def of(federate: Federate) -> "Form":
        """The form of a [federate] table with secure = true.

        Raises:
            UsageError: as of `check_secure`.
        """
        check_secure(federate)
        rule, options = configured(federate.merge, federate.merge_options)
        rho = rule.from_sums(options) if rule.from_sums else None
        signs = rho is not None or REGULARISERS.choose(federate.regulariser).conflict
        noise = ClientNoise.of(federate)
        bound = noise.clip if noise else federate.max_norm or BOUND
        return Form(rho is not None, rho or 1.0, rule.by_rows(options), signs, bound, noise)

    @property
    def labels(self) -> tuple[str, ...]:
        """The sums of a round, in order."""
        return (VALUES, POSITIVE) if self.elects else (VALUES,)

    def words(self, label: str, size: int) -> int:
        """The words of a sum, for an update of so many values."""
        return size * (1 + (self.signs and label == VALUES))

    def reach(self, needed: int) -> float:
        """The largest magnitude of a value that a client gives, where a sum needs so many clients."""
        return self.bound + (REACH * self.noise.deviation(needed) if self.noise else 0.0)

    def weight(self, rows: int, agreement: float, clients: int, top: float) -> float:
        """What a client's values are multiplied with before they are summed, from 0 to 1.

        Args:
            rows: Its rows.
            agreement: Its agreement with the others in the round before.
            clients: How many shared keys.
            top: The most rows of a client, or the largest agreement.

        Raises:
            SumsError: it has more rows than that.
        """
        if self.by_rows and rows > top:
            raise SumsError(f"this client has {rows} rows, and the server says that nobody has more than {top:g}.")
        return rows / top if self.by_rows else weight(agreement, top, clients) if self.elects else 1.0


def check_secure(federate: Federate) -> None:
    """Check that what a [federate] table asks for goes with its secure sums, if it has them.

    Raises:
        UsageError: a rule, an option, a space, a regulariser or an encoding needs single updates; or the quorum is more
            than a sum has.
    """
    if not federate.secure:
        return
    rule, space = RULES.choose(federate.merge), SPACES.choose(federate.space)
    row, wire = REGULARISERS.choose(federate.regulariser), ENCODINGS.choose(federate.wire)
    summable = ", ".join(sorted(name for name, one in RULES.items() if one.from_sums is not None))
    found = {
        f'merge = "{rule.name}" compares single updates; choose one of {summable}': rule.from_sums is None,
        "merge_options.clip_norm shortens single updates at the server; set max_norm, to which clients shorten their "
        "own": CLIP_NORM in federate.merge_options,
        f'space = "{space.name}" merges products, which no client sends; choose factors or frozen-a': not space.lasting,
        f'regulariser = "{row.name}" adds the updates up with other weights as well, and two such sums give away a '
        "client whose weights are not the others'": row.carried is not None,
        "merge_options.r0 and merge_options.delta say what is trimmed, and where few clients keep a coordinate their "
        "sum would be one client's value; leave them out, nothing is trimmed": bool(
            _TRIMMING & {*federate.merge_options}
        ),
        f"quorum = {federate.quorum} asks for more replies than a secure sum has, {MOST_MEMBERS}": federate.quorum
        > MOST_MEMBERS,
        f'wire = "{wire.name}" shortens updates, and masked words cannot be shortened; choose fp32': not wire.plain,
    }
    if problems := [text for text, wrong in found.items() if wrong]:
        raise UsageError("[federate] secure = true lets nobody see a single update. " + "; ".join(problems) + ".")


def check_members(federate: Federate, clients: int) -> None:
    """Check that so many clients can hold a round of secure sums, if a [federate] table asks for them.

    Raises:
        UsageError: they are too few for a sum, or a full round asks too many.
    """
    if federate.secure and clients < LEAST:
        raise UsageError(
            f"[federate] secure = true: a secure sum needs {LEAST} clients, and the number of clients is {clients}. Of "
            "a sum of two, each knows the other's part. Add clients, or set secure = false."
        )
    if federate.secure and federate.participation * clients > MOST_MEMBERS + 1e-9:
        raise UsageError(
            f"[federate] participation = {federate.participation:g}: a full round would ask that share of {clients} "
            f"clients, and with secure = true {MOST_MEMBERS} are the most. Lower it."
        )


def context(start: str, number: int, attempt: int) -> bytes:
    """What all keys and masks of an attempt at a round are bound to.

    Args:
        start: SHA-256 of the adapter that the run began with, 64 hex digits.
        number: The round.
        attempt: How often it was begun before.
    """
    return json.dumps([start, number, attempt]).encode()


def terms(ask: Ask) -> bytes:
    """What the clients' values in a sum follow from, and must be the same for all of them.

    A server that told one client something else could have its values alone, or beside next to nothing of the others'.
    """
    counts = b"" if ask.counts is None else ask.counts.numpy().tobytes()
    return json.dumps([ask.top, ask.usual]).encode() + counts


def threshold(members: int) -> int:
    """Clients that a sum needs, of so many who gave keys: two thirds, and more than a half."""
    return max(math.ceil(members * 2 / 3), members // 2 + 1)
