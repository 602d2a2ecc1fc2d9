import pytest

from fedproxy.errors import SumsError
from fedproxy.privacy.sums import drawn


def test_a_member_knows_its_peers_signatures_and_its_own():
    members = drawn(["ann", "bob"])
    signature = members["ann"].sign(b"x")
    members["bob"].verify("ann", b"x", signature)
    members["ann"].verify("ann", b"x", signature)


@pytest.mark.parametrize("wrong", [b"", b"x" * 64])
def test_a_signature_of_something_else_or_somebody_else_names_the_peer(wrong):
    members = drawn(["ann", "bob"])
    signature = members["ann"].sign(b"x")
    for name, message, given in [("ann", b"y", signature), ("bob", b"x", signature), ("ann", b"x", wrong)]:
        with pytest.raises(SumsError, match=name):
            members["bob"].verify(name, message, given)


def test_nobody_is_registered_under_an_unknown_name():
    members = drawn(["ann"])
    with pytest.raises(SumsError, match="eve"):
        members["ann"].verify("eve", b"x", members["ann"].sign(b"x"))
