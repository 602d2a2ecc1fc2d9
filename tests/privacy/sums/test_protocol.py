import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedproxy.privacy.sums import protocol
from fedproxy.privacy.sums.protocol import Advert, Answer, Packet, Secrets, encoded

LABELS = ("a", "b")
KEYS = {label: Secrets(label.encode() * 32, b"k" * 32) for label in LABELS}
ADVERT = Advert(b"s" * 32, KEYS, b"signature")
PACKET = Packet(KEYS, b"x" * (2 * 48 + 16))
ANSWER = Answer({"ann": b"0" * 16}, {"bob": b"1" * 32})


def test_what_is_encoded_is_read_again():
    assert Advert.decode(encoded(ADVERT), LABELS) == ADVERT
    assert Packet.decode(encoded(PACKET), LABELS) == PACKET
    assert Answer.decode(encoded(ANSWER), ["ann"], ["bob"]) == ANSWER


def test_an_answer_by_hand():
    expected = (
        b'{"keys":{"bob":"MTExMTExMTExMTExMTExMTExMTExMTExMTExMTExMTE="},"seeds":{"ann":"MDAwMDAwMDAwMDAwMDAwMA=="}}'
    )
    assert encoded(ANSWER) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[" * 60_000,
        b"1" * 60_000,
        b"NaN",
        b"\xff\xfe",
        b"x" * (5 << 20),
        b" " + encoded(ADVERT),
        encoded(ADVERT).replace(b'"key"', b'"kez"', 1),
        encoded(ADVERT).replace(b'"sealing":"', b'"sealing":"AAAA'),
        encoded(ADVERT)[:-1] + b',"sealing":""}',
        encoded(ADVERT).replace(b"=", b"", 1),
        encoded(ADVERT).replace(b'"c2lnbmF0dXJl"', b"17"),
        encoded(ADVERT).replace(b'"c2lnbmF0dXJl"', '"ä"'.encode()),
    ],
)
def test_bytes_in_another_form_are_no_payload(data):
    for read in (
        lambda: Advert.decode(data, LABELS),
        lambda: Packet.decode(data, LABELS),
        lambda: Answer.decode(data, ["ann"], ["bob"]),
    ):
        with pytest.raises(ValueError, match=r"."):
            read()


def test_payloads_for_other_labels_or_members_are_none():
    with pytest.raises(ValueError, match="part"):
        Advert.decode(encoded(ADVERT), ("a",))
    with pytest.raises(ValueError, match="part"):
        Packet.decode(encoded(PACKET), ("a", "b", "c"))
    with pytest.raises(ValueError, match="part"):
        Answer.decode(encoded(ANSWER), ["ann", "bob"], [])


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    with pytest.raises(ValueError, match=r"."):
        Advert.decode(data, LABELS)


def test_shares_are_packed_in_the_order_of_labels():
    shares = {"b": Secrets(b"3" * 16, b"4" * 32), "a": Secrets(b"1" * 16, b"2" * 32)}
    assert protocol.packed(shares, LABELS) == b"1" * 16 + b"2" * 32 + b"3" * 16 + b"4" * 32
    assert protocol.unpacked(protocol.packed(shares, LABELS), LABELS) == shares


def test_a_digest_by_hand():
    expected = hashlib.sha256(b'["fedproxy secure sums 1","x",7,["a"],{"n":"AQ=="}]').digest()
    assert protocol.digest("x", 7, ["a"], {"n": b"\x01"}) == expected


def test_what_a_digest_is_of_cannot_be_moved_from_part_to_part():
    assert protocol.digest("a", "bc") != protocol.digest("ab", "c")
    assert protocol.digest("a", "b") != protocol.digest("a", "b", "")


def test_both_of_a_pair_derive_the_same_mask_and_each_label_and_context_another():
    one, two = b"1" * 32, b"2" * 32
    first, second = protocol.public_key(one), protocol.public_key(two)
    key = protocol.pair_mask_key(one, second, b"t", "a", "ann", "bob")
    assert key == protocol.pair_mask_key(two, first, b"t", "a", "bob", "ann")
    assert key != protocol.pair_mask_key(one, second, b"t", "b", "ann", "bob")
    assert key != protocol.pair_mask_key(one, second, b"u", "a", "ann", "bob")


def test_each_direction_of_a_pair_has_a_sealing_key_of_its_own():
    one, two = b"1" * 32, b"2" * 32
    there = protocol.sealing_key(one, protocol.public_key(two), b"t", "ann", "bob")
    assert there == protocol.sealing_key(two, protocol.public_key(one), b"t", "ann", "bob")
    assert there != protocol.sealing_key(one, protocol.public_key(two), b"t", "bob", "ann")


def test_a_public_key_of_small_order_is_refused():
    with pytest.raises(ValueError, match=r"."):
        protocol.pair_mask_key(b"1" * 32, bytes(32), b"t", "a", "ann", "bob")
