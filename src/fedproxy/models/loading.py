"""Tensors of a checkpoint put into a model on the meta device, some at a time, as transformers would."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from fedproxy.models.families import blocks


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing bars and warnings."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class Loader:
    """Puts tensors of a checkpoint into a model on the meta device, converted as transformers converts them.

    Args:
        model: The model.
        device: Where the tensors go.
        dtype: Their data type there; the model's own if none.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._model = model
        self._device, self._dtype = device, dtype
        mapping: Any = get_model_conversion_mapping(model)
        self._config = LoadStateDictConfig(
            device_map={"": device},
            dtype=model.dtype,
            dtype_plan=model._get_dtype_plan(model.dtype),
            weight_mapping=mapping,
        )

    def load(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Load tensors; those the model has no place for are ignored.

        Returns:
            The names of the model's weights that are not among them, or have another shape there.
        """
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), self._config)
        if self._dtype is not None:
            for parameter in self._model.parameters():
                if not parameter.is_meta and parameter.is_floating_point():
                    parameter.data = parameter.data.to(self._dtype)
        self._model._adjust_missing_and_unexpected_keys(info)
        lost: set[str] = info.missing_and_mismatched()
        partners = self._model.all_tied_weights_keys.items()
        tied = {one for pair in partners for one, other in (pair, pair[::-1]) if other not in lost}
        return sorted(lost - tied)

    def load_buffers(self) -> None:
        """Compute the buffers that no checkpoint holds (rotary tables, scales), and tie what is tied."""
        model, inside = self._model, {id(module) for block in blocks(self._model) for module in block.modules()}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device=self._device)
                    module._is_hf_initialized = False  # type: ignore[assignment]
        with torch.no_grad():
            model.initialize_weights()  # type: ignore[no-untyped-call]
        missing = {
            f"{path}.{name}"
            for path, module in model.named_modules()
            if id(module) not in inside
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.is_meta
        }
        model.tie_weights(missing_keys=missing, recompute_mapping=False)

    @contextlib.contextmanager
    def holding(self, block: nn.Module, tensors: Mapping[str, torch.Tensor], *, keep: bool) -> Iterator[None]:
        """Put `tensors` into `block`, while the context lasts or to keep."""
        with contextlib.nullcontext() if keep else restored(block):
            self.load(tensors)
            yield


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put back, in the end, the weights of a model or block that are exchanged while the context lasts."""
    own = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        yield
    finally:
        for module, parameters in own:
            module._parameters.update(parameters)


def release(model: nn.Module) -> None:
    """Free the memory of a model's or block's weights; they can be loaded again. Buffers stay."""
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                fresh = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                module._parameters[name] = empty.setdefault(id(parameter), fresh)
