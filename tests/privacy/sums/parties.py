"""The parties of a secure sum in one process: what tests carry between members and the server."""

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from fedproxy.privacy.sums import Identity, Member, Tally

NAMES = tuple("abcdefgh")
LABELS = ("signs", "values")
CONTEXT = b"run 1, round 2, attempt 3"
_KEYS = {name: ec.generate_private_key(ec.SECP256R1()) for name in NAMES}
_PEERS = {name: key.public_key() for name, key in _KEYS.items()}
IDENTITIES = {name: Identity(name, key, _PEERS) for name, key in _KEYS.items()}


def members(count, context=CONTEXT, labels=LABELS, **options):
    return {name: Member(IDENTITIES[name], context, labels, **options) for name in NAMES[:count]}


def advertised(group, threshold, context=CONTEXT, labels=LABELS):
    tally = Tally(context, labels, threshold)
    for name, member in group.items():
        tally.advertised(name, member.advertise())
    return tally


def shared(group, threshold, sharers=None, **where):
    tally = advertised(group, threshold, **where)
    adverts = tally.adverts()
    for name in group if sharers is None else sharers:
        tally.shared(name, group[name].share(adverts, threshold))
    return tally


def masked(group, tally, label, words, maskers=None):
    for name in group if maskers is None else maskers:
        tally.masked(label, name, group[name].mask(label, words[name], tally.packets_for(name)))
    return tally.survivors(label)


def agreed(group, tally, label, survivors, signers=None):
    for name in survivors if signers is None else signers:
        tally.agreed(label, name, group[name].agree(label, survivors))
    return tally.agreements(label)


def revealed(group, tally, label, survivors, revealers=None, agreements=None):
    for name in survivors if revealers is None else revealers:
        tally.revealed(label, name, group[name].reveal(label, survivors, agreements))
    return tally.opened(label)


def everything(value, seen=None):
    """All bytes and arrays that can be reached from an object's attributes."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, bytes | bytearray | np.ndarray):
        return [bytes(value)]
    parts = list(getattr(value, "__dict__", {}).values())
    if isinstance(value, dict):
        parts += [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        parts += list(value)
    return [each for part in parts for each in everything(part, seen)]
