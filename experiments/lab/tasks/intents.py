"""A few intents of data sets that have many, in the order of their task's choices."""

from collections.abc import Callable
from typing import Any


def _only(*intents: str) -> Callable[[Any], Any]:
    """Keeps the rows of these intents; `choice` is the position of a row's intent."""

    def process(docs: Any) -> Any:
        kept = docs.filter(lambda row: row["label_text"] in intents)
        return kept.map(lambda row: {"choice": intents.index(row["label_text"])})

    return process


kitchen = _only(
    "recipe",
    "ingredients_list",
    "calories",
    "nutrition_info",
    "cook_time",
    "food_last",
    "meal_suggestion",
    "ingredient_substitution",
)
wallet = _only(
    "atm_support",
    "apple_pay_or_google_pay",
    "contactless_not_working",
    "edit_personal_details",
    "exchange_rate",
    "passcode_forgotten",
    "top_up_limits",
    "transfer_timing",
)
