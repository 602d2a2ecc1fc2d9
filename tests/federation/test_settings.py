import pytest

from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.aggregation.space import SPACES
from fedproxy.config import Federate
from fedproxy.errors import UsageError
from fedproxy.federation.settings import check_settings
from fedproxy.federation.wire import ENCODINGS


def test_the_defaults_go_together():
    check_settings(Federate())


@pytest.mark.parametrize("space", [name for name, row in SPACES.items() if row.lasting])
@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_where_factors_are_merged_every_regulariser_has_a_meaning(space, regulariser):
    check_settings(Federate(space=space, regulariser=regulariser))


@pytest.mark.parametrize("wire", ENCODINGS)
def test_every_encoding_goes_up_and_those_that_send_all_values_down(wire):
    check_settings(Federate(wire=wire))
    if ENCODINGS[wire].by_share:
        with pytest.raises(UsageError, match=wire):
            check_settings(Federate(wire_down=wire))
    else:
        check_settings(Federate(wire_down=wire))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"space": "product"}, '"pcr".*"product".*none or fedprox.*factors, frozen-a'),
        ({"space": "product", "regulariser": "scaffold"}, '"scaffold".*"product"'),
        ({"space": "product", "regulariser": "none", "wire_down": "int8"}, 'wire_down = "int8".*"product".*fp32'),
        ({"wire": "int4", "wire_options": {"blok": 64}}, "blok.*block"),
        ({"wire": "int3"}, "wire = 'int3'"),
        ({"merge_options": {"row": 1.1}}, "rho"),
        ({"server_options": {"momentum": 0.9}}, "Unknown option of the server optimizer none"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, says):
    with pytest.raises(UsageError, match=says):
        check_settings(Federate(**settings))
