"""What of a [federate] table goes together, and with how many clients."""

from collections.abc import Collection

from fedproxy.aggregation.merge import configured
from fedproxy.aggregation.merge.clipping import CLIP_NORM
from fedproxy.aggregation.merge.mean import MEAN
from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.aggregation.server_optimizer import server_optimizer
from fedproxy.aggregation.space import SPACES
from fedproxy.config import Federate
from fedproxy.errors import MissingExtraError, UsageError
from fedproxy.federation.secure.form import check_members, check_secure
from fedproxy.federation.wire import ENCODINGS, encoding
from fedproxy.privacy.client_noise import ClientNoise, check_delta


def require_sums() -> None:
    """Check that what secure sums need is installed.

    Raises:
        MissingExtraError: it is not.
    """
    try:
        import Crypto  # noqa: F401
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("secure sums", "federation") from error


def check_settings(federate: Federate, clients: Collection[str] = ()) -> None:
    """Check names, options, combinations that have no meaning, and rounds that can never be held.

    Args:
        federate: The table.
        clients: The clients' names; none if they are not known yet.

    Raises:
        MissingExtraError: secure sums or a budget are asked for, and what they need is not installed.
        UsageError: a name or option is unknown, a value is impossible, or two settings exclude each other.
    """
    configured(federate.merge, federate.merge_options)
    server_optimizer(federate.server_optimizer, federate.server_options)
    encoding(federate.wire, federate.wire_options)
    down, _ = encoding(federate.wire_down, {})
    check_secure(federate)
    check_client_privacy(federate)
    ClientNoise.of(federate)
    if federate.secure:
        require_sums()
    if clients:
        check_roster(federate, clients)
    chosen, row = SPACES.choose(federate.space), REGULARISERS.choose(federate.regulariser)
    if down.by_share:
        raise UsageError(f'[federate] wire_down = "{down.name}" leaves values out; an adapter is sent whole.')
    if chosen.lasting:
        return
    for key, name, refused, alike in (
        ("regulariser", row.name, row.lasting, [one.name for one in REGULARISERS.values() if not one.lasting]),
        ("wire_down", down.name, not down.plain, [one.name for one in ENCODINGS.values() if one.plain]),
    ):
        if refused:
            lasting = ", ".join(one.name for one in SPACES.values() if one.lasting)
            raise UsageError(
                f'[federate] {key} = "{name}" goes by parameters of rounds before, and those of the space '
                f'"{chosen.name}" turn into others from round to round. Choose {key} {" or ".join(alike)}, or one of '
                f"the spaces {lasting}."
            )


def check_roster(federate: Federate, clients: Collection[str]) -> None:
    """Check that these clients can hold a round.

    Raises:
        UsageError: they are fewer than the quorum; or as of `check_members` and `check_delta`.
    """
    check_members(federate, len(clients))
    check_delta(federate, len(clients))
    if isinstance(federate.quorum, int) and len(clients) < federate.quorum:
        raise UsageError(
            f"[federate] quorum = {federate.quorum}: a round needs so many clients, and the number of clients is "
            f"{len(clients)}. Add clients, or lower it."
        )


def check_client_privacy(federate: Federate) -> None:
    """Check that what a [federate] table asks for goes with its [federate.privacy], if it has one.

    Raises:
        UsageError: something would tell of clients what the budget does not cover; each is named.
    """
    if federate.privacy is None:
        return
    row = REGULARISERS.choose(federate.regulariser)
    uniform = federate.merge_options.get("weights") == "uniform"
    found = {
        f'merge = "{federate.merge}" has no known sensitivity; choose "{MEAN.name}" with merge_options.weights = '
        '"uniform"': federate.merge != MEAN.name or not uniform,
        f'regulariser = "{row.name}" tells every client of the others\' updates; choose fedprox or none': row.tells,
        f'space = "{federate.space}" merges products, whose norm no clip bounds; choose factors or '
        "frozen-a": not SPACES.choose(federate.space).lasting,
        "validation has clients send scores, which the budget does not cover; set it to 0": federate.validation > 0,
        "merge_options.clip_norm and max_norm are what clip is: leave them out": CLIP_NORM in federate.merge_options
        or federate.max_norm is not None,
    }
    if problems := [text for text, wrong in found.items() if wrong]:
        raise UsageError("[federate.privacy] bounds what is told of a whole client. " + "; ".join(problems) + ".")
