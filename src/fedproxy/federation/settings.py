"""What of a [federate] table goes together."""

from fedproxy.aggregation.merge import configured
from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.aggregation.server_optimizer import server_optimizer
from fedproxy.aggregation.space import SPACES
from fedproxy.config import Federate
from fedproxy.errors import MissingExtraError, UsageError
from fedproxy.federation.client_privacy import check_client_privacy
from fedproxy.federation.secure.form import check_secure
from fedproxy.federation.wire import ENCODINGS, encoding
from fedproxy.privacy.accounting import require_accounting


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


def check_settings(federate: Federate) -> None:
    """Check names, options, and combinations that have no meaning.

    Raises:
        MissingExtraError: secure sums are asked for, and what they need is not installed.
        UsageError: a name or option is unknown, a value is impossible, or two settings exclude each other.
    """
    configured(federate.merge, federate.merge_options)
    server_optimizer(federate.server_optimizer, federate.server_options)
    encoding(federate.wire, federate.wire_options)
    down, _ = encoding(federate.wire_down, {})
    check_secure(federate)
    check_client_privacy(federate)
    if federate.privacy is not None:
        require_accounting("[federate.privacy]")
    if federate.secure:
        require_sums()
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
