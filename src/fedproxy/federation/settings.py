"""What of a [federate] table goes together."""

from fedproxy.aggregation.merge import configured
from fedproxy.aggregation.regularise import PCR, SCAFFOLD
from fedproxy.aggregation.server_optimizer import server_optimizer
from fedproxy.aggregation.space import space, without_conflict
from fedproxy.config import Federate
from fedproxy.errors import UsageError
from fedproxy.federation.parcel import PLAIN
from fedproxy.federation.wire import encoding


def check_settings(federate: Federate) -> None:
    """Check names, options, and combinations that have no meaning.

    Raises:
        UsageError: a name or option is unknown, a value is impossible, or two settings exclude each other.
    """
    configured(federate.merge, federate.merge_options)
    server_optimizer(federate.server_optimizer, federate.server_options)
    encoding(federate.wire, federate.wire_options)
    encoding(federate.wire_down, {})
    chosen = space(federate.space)
    if chosen.conflicts:
        return
    if federate.regulariser == PCR:
        raise UsageError(f"[federate] {without_conflict(chosen)}")
    if federate.regulariser == SCAFFOLD:
        raise UsageError(
            f'[federate] regulariser = "scaffold" has no meaning in the space "{federate.space}": re-factoring turns '
            'the factors from round to round, and control variates with them. Choose "factors" or "frozen-a".'
        )
    if federate.wire_down != PLAIN:
        raise UsageError(
            f'[federate] wire_down = "{federate.wire_down}" sends what the adapter moved since the start; in the space '
            f'"{federate.space}" re-factoring turns it altogether. Choose wire_down = "fp32".'
        )
