"""The LM evaluation harness as a library: imported when first needed, silent, and without traces."""

import contextlib
import functools
import importlib
import logging
import random
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fedproxy.errors import ArtifactError, MissingExtraError

SEED = 1234


def harness_module(name: str) -> Any:
    """Import a module of the harness, of the datasets library it stands on, or of ours that imports them.

    Raises:
        MissingExtraError: they are not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("lm_eval", "datasets"):
            raise
        raise MissingExtraError("evaluate", "eval") from error


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Keep the harness's effects within the block.

    It logs errors only, draws no progress bars, reports no download counts to the network, renders templates in a
    sandbox, compiles each once instead of once for each row, and finds the global random generators freshly seeded. All
    is put back afterwards.
    """
    datasets, utils = harness_module("datasets"), harness_module("lm_eval.utils")
    logger = logging.getLogger("lm_eval")
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, value: object) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        for name in ("lm_eval.api.model", "lm_eval.api.task", "lm_eval.models.huggingface"):
            module = harness_module(name)
            replace(module, "tqdm", functools.partial(_without_bar, module.tqdm))
        if not datasets.utils.are_progress_bars_disabled():
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        replace(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        # Every template goes through this global, which the harness looks up for each text and takes from nowhere else.
        replace(utils, "env", _sandboxed(utils.env))
        # fsspec renders by this class what a data set may refer to.
        replace(Template, "environment_class", ImmutableSandboxedEnvironment)
        yield


def _sandboxed(environment: Environment) -> Environment:
    """An environment that renders the same, but reaches nothing beyond the row, and compiles each template once."""
    sandbox: Any = ImmutableSandboxedEnvironment(
        loader=environment.loader,
        undefined=environment.undefined,
        keep_trailing_newline=environment.keep_trailing_newline,
    )
    sandbox.filters |= environment.filters
    sandbox.from_string = functools.cache(sandbox.from_string)
    return typing.cast(Environment, sandbox)


@contextlib.contextmanager
def templates_of(task: str) -> Iterator[None]:
    """Say of which task a template is that cannot be rendered.

    Raises:
        ArtifactError: a template does not fit the rows, or is unsafe.
    """
    try:
        yield
    except TemplateError as error:
        raise ArtifactError(f"a template of the task {task!r} cannot be rendered: {error}.") from error


def _without_bar(bar: Any, *args: Any, **options: Any) -> Any:
    return bar(*args, **{**options, "disable": True})
