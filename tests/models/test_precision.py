from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedproxy.models import precision


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_narrowed_on_a_fast_cpu_to_what_is_stored_so(
    stored: torch.dtype, fast: bool, gpu: bool, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(precision, "bf16_is_fast", lambda device: fast)
    narrowed = fast and not gpu and stored == torch.bfloat16
    assert precision.scored_products(tiny_checkpoint(dtype=stored)) == (torch.bfloat16 if narrowed else None)
    assert precision.scored_dtype() == (None if gpu else torch.float32)
