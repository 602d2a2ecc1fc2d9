"""`fedproxy join` of a client that spoils each of its answers in another way."""

import random
import sys

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedproxy.cli import main
from fedproxy.deployment.flower import exchange
from fedproxy.federation.session import Session

CHANCE = random.Random(1)


def spoilt(data: bytes, chance: random.Random) -> bytes:
    """The bytes with something cut, changed, put in, doubled or moved."""
    kind, begin = chance.randrange(5), chance.randrange(len(data) + 1)
    end = min(len(data), begin + chance.choice((1, 8, 100)))
    if kind == 0:
        return data[:begin]
    if kind == 1:
        return data[:begin] + chance.randbytes(end - begin) + data[end:]
    if kind == 2:
        return data[:begin] + chance.randbytes(chance.choice((1, 16, 5000))) + data[begin:]
    if kind == 3:
        return data[:end] + data[begin:]
    return data[begin:] + data[:begin]


def odd(key: str, data: bytes) -> RecordDict:
    """Records that Flower takes and no answer is."""
    arrays = [
        Array("uint8", (len(data),), "fedproxy.bytes", spoilt(data, CHANCE)),
        Array("float64", (0, 10**30), "numpy.ndarray", data[:8]),
        Array("x" * 1000, (-1,), "\x1b[2J", b""),
    ]
    records = [
        RecordDict(),
        RecordDict({key: ConfigRecord({"bytes": data})}),
        RecordDict({key: ArrayRecord()}),
        *(RecordDict({key: ArrayRecord({"bytes": array})}) for array in arrays),
    ]
    return CHANCE.choice(records)


def answer(self: Session, name: str, order: bytes, on_step: object) -> tuple[bytes, None]:
    said, _ = honest(self, name, order, on_step)
    return spoilt(said, CHANCE), None


if __name__ == "__main__":
    honest, Session.answer = Session.answer, answer
    pack = exchange.pack
    exchange.pack = lambda key, data: (odd if CHANCE.random() < 0.5 else pack)(key, data)
    main(sys.argv[1:])
