"""What the server has of a round: no client's update, words or mask, in none of its objects."""

import gc
import types

import numpy as np
import pytest
import torch

from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.secure import client as client_module
from tests.federation.secure.party import NAMES, PHI, SEVEN, Party, flat, reply, table, update

CODE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.FrameType)


def contents(root):
    """The bytes of all arrays, tensors and byte strings that can be reached from an object."""
    seen, left = {}, [root]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, CODE):
            continue
        seen[id(one)] = one  # kept, so that no other gets its id
        if isinstance(one, torch.Tensor):
            yield one.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if one.numel() else b""
        elif isinstance(one, np.ndarray):
            yield one.tobytes()
        elif isinstance(one, bytes | bytearray):
            yield bytes(one)
        elif not isinstance(one, type):
            left += gc.get_referents(one)


def forms(values):
    """A vector as it may lie in memory, whole and each tensor of it alone."""
    parts = [values, values[:24], values[24:]]
    return [part.to(dtype).numpy().tobytes() for part in parts for dtype in (torch.float32, torch.float64)]


@pytest.fixture
def secrets(monkeypatch):
    """Whatever clients hold in secret, as bytes, as they come to hold it."""
    found = []
    mask = client_module.Member.mask

    def recorded(self, label, words, *rest):
        masked = mask(self, label, words, *rest)
        for part in (slice(None), slice(24)):
            if words[part].any():  # else the masked words are the mask, and hide nothing
                found.extend([words[part].tobytes(), (masked - words)[part].tobytes()])
        return masked

    monkeypatch.setattr(client_module.Member, "mask", recorded)
    return found


@pytest.mark.parametrize(
    "gone", [{}, {"c": ("mask", "positive")}, {"c": ("agree", "positive")}, {"c": ("agree", "values")}], ids=str
)
@pytest.mark.parametrize("settings", [{"merge": "h-ties", "regulariser": "pcr"}, {}], ids=str)
def test_nothing_of_a_single_client_is_in_the_server(tmp_path, secrets, settings, gone):
    party = Party(tmp_path, SEVEN, **settings)
    for name in SEVEN:
        secrets.extend(forms(flat(update(name))))
    looks = 0

    def look():
        nonlocal looks
        looks += 1
        held = b"\0".join(contents(party.server))
        assert not [secret for secret in secrets if secret in held]

    party.round(seen=look, gone=gone)
    assert looks > 5 * len(SEVEN)
    look()
    spooled = b"\0".join(path.read_bytes() for path in (tmp_path / "spool").iterdir())
    assert not [secret for secret in secrets if secret in spooled]


def test_the_same_look_finds_a_plain_update():
    server = Coordinator(NAMES, PHI, table(secure=False))
    server.begin(NAMES)
    server.receive("x", reply("x", server.order("x"), update("x")))
    held = b"\0".join(contents(server))
    assert update("x")["a"].numpy().tobytes() in held
    assert update("y")["a"].numpy().tobytes() not in held
