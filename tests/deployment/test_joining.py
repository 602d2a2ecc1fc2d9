from fedproxy.deployment.address import Address
from fedproxy.deployment.joining import Joining, Owner
from tests.deployment.test_gateway import proxy, start, superlink  # noqa: F401


def test_a_server_that_goes_and_comes_back_is_told_once_each_way(start, caplog):  # noqa: F811
    hub = start(registered=False)
    owner = Owner(Joining(Address("127.0.0.1", hub.gateway.port), None, name="bank"))
    offer = owner.ask().offer
    assert owner.still_offers(offer)
    hub.gateway.close()
    owner._link.close()  # what the server's end does to a connection
    for _ in range(3):
        assert owner.still_offers(offer)
    start(registered=False, port=hub.gateway.port)
    caplog.set_level("INFO", "fedproxy")
    for _ in range(3):
        assert owner.still_offers(offer)
    owner._link.close()
    where = f"127.0.0.1:{hub.gateway.port}"
    told = [record.getMessage() for record in caplog.records if record.name == "fedproxy.deployment.joining"]
    assert told == [f"{where} is away. It is waited for, up to 600 s.", f"{where} is back."]
