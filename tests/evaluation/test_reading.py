from pathlib import Path

from fedproxy.evaluation.reading import Reading, reading_of
from tests.conftest import make_tokenizer


def test_by_hand(include: Path) -> None:
    """A token a byte; three rows. Contexts are read once, beside every option, or three tokens are generated."""
    found = reading_of(["colours", "spelling"], make_tokenizer(), data=None, include=include, limit=None)
    contexts = sum(len(f"Name the colour.\nthe {word} river is") for word in ("red", "green", "blue"))
    options = len(" red" + " green" + " blue")
    assert found["colours"] == Reading(documents=3, tokens=contexts + 3 * options)
    assert found["spelling"] == Reading(3, sum(len(f"Spell {w}:") for w in ("red", "green", "blue")) + 3 * 3)


def test_a_limit_counts_rows(data: Path) -> None:
    some, all_rows = (
        reading_of(["arc_easy"], make_tokenizer(), data=data, include=None, limit=limit)["arc_easy"]
        for limit in (2, None)
    )
    assert (some.documents, all_rows.documents) == (2, 6)
    assert 0 < some.tokens < all_rows.tokens
