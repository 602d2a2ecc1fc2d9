"""Attacks by name. To add one: a file here that ends in an `Attack`, and its row in `ATTACKS`."""

from typing import Any

from fedproxy.privacy.attacks.calibrated_loss import CALIBRATED_LOSS
from fedproxy.privacy.attacks.contract import Attack, Figure, Found
from fedproxy.privacy.attacks.llm_from_proxy import LLM_FROM_PROXY
from fedproxy.privacy.attacks.planted_secrets import PLANTED_SECRETS
from fedproxy.privacy.attacks.subject import Subject
from fedproxy.privacy.attacks.token_spans import TOKEN_SPANS
from fedproxy.privacy.attacks.update_residuals import UPDATE_RESIDUALS
from fedproxy.registry import Axis

__all__ = ["ATTACKS", "Attack", "Figure", "Found", "Subject"]

ATTACKS: Axis[Attack[Any]] = Axis(
    "attack",
    "fedproxy.attacks",
    Attack,
    {
        attack.name: attack
        for attack in (CALIBRATED_LOSS, UPDATE_RESIDUALS, TOKEN_SPANS, PLANTED_SECRETS, LLM_FROM_PROXY)
    },
)
