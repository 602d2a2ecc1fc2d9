"""LoRA adapters on models: attached to the blocks, taken out as tensors, put back, and what PEFT itself wrote read."""

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from fedproxy.adapter_checks import check_config, check_finite, check_layout, check_targets, is_lora, parameter_name
from fedproxy.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from fedproxy.artifacts import CONFIG_BYTES, MANIFEST, Manifest, read_json
from fedproxy.checkpoint_files import CONFIG, model_identity
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.layer_map import ADAPTER_PREFIX
from fedproxy.models.checkpoints import hub_id, load_model, resolve
from fedproxy.models.families import blocks, blocks_path, linear_layers, stored_transposed
from fedproxy.seeds import derive_seed
from fedproxy.tensor_files import load_tensors

AdaptedModel = PeftModel
"""A model with an adapter."""
AdapterConfig = LoraConfig

_DEFAULTS: dict[str, Any] = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
_ALWAYS_SAID = (
    *("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout", "peft_type"),
    *("r", "target_modules", "task_type"),
)
"""What adapter_config.json holds also where it is PEFT's default; every release of PEFT knows these keys."""
_NO_PATTERN = dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"))


def target_names(model: PreTrainedModel, targets: str | Sequence[str]) -> tuple[list[str], bool]:
    """The linear layers within a block that `targets` (see `attach`) means, and whether they are stored transposed.

    Raises:
        ArtifactError: the model has no blocks that can be found.
        UsageError: a target is no linear layer of a block, or they are of two sorts.
    """
    linear = {name: layer for block in blocks(model) for name, layer in linear_layers(block).items()}
    if targets == "all-linear":
        targets = sorted(linear)
    wanted = [targets] if isinstance(targets, str) else targets
    matches = {want: {name for name in linear if f".{name}".endswith(f".{want}")} for want in wanted}
    chosen = set().union(*matches.values())
    lost = sorted(want for want, names in matches.items() if not names)
    if lost or not chosen:
        raise UsageError(f"LoRA targets {lost} are no linear layer of a block; there are: {', '.join(sorted(linear))}.")
    conv = {stored_transposed(linear[name]) for name in chosen}
    if len(conv) > 1:
        raise UsageError(f"LoRA targets {sorted(chosen)} mix Linear and Conv1D layers. Choose one sort.")
    return sorted(chosen), conv.pop()


def check_fits(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Check that every tensor of an adapter has its place in `model`, which may be on the meta device.

    A LoRA matrix belongs to a linear layer of a block, and fits its shape; a trained weight replaces one of its shape.

    Raises:
        ArtifactError: one does not.
    """
    path, transposed = blocks_path(model), bool(config.get("fan_in_fan_out"))
    layers = {
        f"{path}.{number}.{name}.weight": layer
        for number, block in enumerate(blocks(model))
        for name, layer in linear_layers(block).items()
    }
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    for name, tensor in tensors.items():
        parameter, shape = parameter_name(name), tuple(tensor.shape)
        if not is_lora(name):
            if parameter not in shapes:
                raise ArtifactError(f"adapter tensor {name!r} is of no weight of {type(model).__name__}.")
            if shape != shapes[parameter]:
                raise ArtifactError(f"adapter tensor {name!r} has shape {shape}, its weight {shapes[parameter]}.")
            continue
        if parameter not in layers:
            raise ArtifactError(f"adapter tensor {name!r} belongs to no linear layer of {type(model).__name__}.")
        layer = layers[parameter]
        if stored_transposed(layer) != transposed:
            raise ArtifactError(f"adapter tensor {name!r}: fan_in_fan_out = {transposed} does not fit its layer.")
        outputs, inputs = reversed(layer.weight.shape) if transposed else layer.weight.shape
        found, need = (tensor.shape[1], inputs) if ".lora_A." in name else (tensor.shape[0], outputs)
        if found != need:
            raise ArtifactError(
                f"adapter tensor {name!r} has shape {shape}; its layer has {inputs} inputs and {outputs} outputs."
            )


def attach(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float,
    targets: str | Sequence[str] = "all-linear",
    layers: Sequence[int] | None = None,
    seed: int,
) -> PeftModel:
    """Put a fresh LoRA adapter on the blocks of `model`; everything else is frozen.

    A is drawn uniformly from ±1/sqrt(inputs) by a generator of its own, B is zero; both are float32. The head and the
    embeddings are never touched. The global random state is neither used nor changed.

    Args:
        model: A decoder; PEFT changes it in place.
        r: Rank.
        alpha: The adapter's output is scaled by alpha / r.
        dropout: Probability of dropping an input of A.
        targets: "all-linear", or names of linear layers within a block, as in ["self_attn.q_proj", "up_proj"].
        layers: Numbers of the blocks that get an adapter; all if none.
        seed: Seed of A; the same seed gives the same bits.

    Returns:
        The model with its adapter, in training state as far as `model` was.

    Raises:
        ArtifactError: the model has no blocks that can be found.
        UsageError: a target, block number, rank, alpha or dropout is impossible.
    """
    path, count = blocks_path(model), len(blocks(model))
    names, transposed = target_names(model, targets)
    if layers is not None and (not layers or not all(0 <= i < count for i in layers)):
        raise UsageError(f"LoRA layers {list(layers)} must be block numbers from 0 to {count - 1}, at least one.")
    if r < 1 or not math.isfinite(alpha) or not 0 <= dropout < 1:
        raise UsageError(f"LoRA needs r ≥ 1, a finite alpha and 0 ≤ dropout < 1; got r={r}, alpha={alpha}, {dropout=}.")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=names,
        layers_to_transform=sorted(set(range(count) if layers is None else layers)),
        layers_pattern=path.rpartition(".")[2],
        fan_in_fan_out=transposed,
    )
    training = model.training
    adapted = _wrap(model, config)
    adapted.train(training)
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora"))
    with torch.no_grad():
        for name, parameter in sorted(adapter_parameters(adapted).items()):
            if ".lora_A." in name:
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
            else:
                parameter.zero_()
    return adapted


def adapter_shapes(
    model: PreTrainedModel, *, r: int, targets: str | Sequence[str] = "all-linear", layers: Sequence[int]
) -> dict[str, torch.Size]:
    """The shapes of the tensors that `attach` would make, by name; the model may be on the meta device.

    Arguments, and what is raised, are as of `attach`.
    """
    names, transposed = target_names(model, targets)
    path, all_blocks, found = blocks_path(model), blocks(model), dict[str, torch.Size]()
    for number in layers:
        for name, layer in linear_layers(all_blocks[number]).items():
            if name in names:
                rows, columns = layer.weight.shape[::-1] if transposed else layer.weight.shape
                place = f"{ADAPTER_PREFIX}{path}.{number}.{name}"
                found[f"{place}.lora_A.weight"] = torch.Size((r, columns))
                found[f"{place}.lora_B.weight"] = torch.Size((rows, r))
    return dict(sorted(found.items()))


def _wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        return get_peft_model(model, config)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters themselves, named as in PEFT's `adapter_model.safetensors`."""
    return {
        name.removesuffix(".default.weight") + ".weight": parameter
        for name, parameter in model.named_parameters()
        if name.endswith((".lora_A.default.weight", ".lora_B.default.weight"))
    }


@contextlib.contextmanager
def without_adapter(model: AdaptedModel) -> Iterator[None]:
    """Let a model compute what it does without its adapter; afterwards the same tensors are trained as before."""
    trained = {parameter: parameter.requires_grad for parameter in adapter_parameters(model).values()}
    try:
        with model.disable_adapter():
            yield
    finally:  # PEFT lets all be trained
        for parameter, before in trained.items():
            parameter.requires_grad_(before)


def train_only(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Freeze the adapter's parameters but those whose names `chosen` picks."""
    for name, parameter in adapter_parameters(model).items():
        parameter.requires_grad_(chosen(name))


def without_dropout(model: PeftModel, numbers: Collection[int]) -> None:
    """Let the adapter's inputs in the blocks of these numbers pass whole, in training, too."""
    base: Any = model.get_base_model()
    held: list[Any] = [module for number in numbers for module in blocks(base)[number].modules()]
    for module in held:
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Identity()


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return float32 CPU copies of the adapter's tensors, named as in PEFT's `adapter_model.safetensors`."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in sorted(adapter_parameters(model).items())
    }


def set_adapter_state(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy `tensors` into the adapter of `model`.

    Raises:
        ArtifactError: names or shapes are not exactly the adapter's, or a value is NaN or infinite; nothing is changed.
    """
    parameters = adapter_parameters(model)
    missing, foreign = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or foreign:
        raise ArtifactError(
            f"the adapter does not fit the model: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(foreign)} are unknown {foreign[:3]}."
        )
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape:
            raise ArtifactError(
                f"adapter tensor {name!r} has shape {tuple(tensor.shape)}, "
                f"the model needs {tuple(parameters[name].shape)}."
            )
    check_finite(tensors, "the adapter")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def without_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's configuration without what is PEFT's default: older releases refuse keys that they do not know."""
    return {k: v for k, v in config.items() if k in _ALWAYS_SAID or k not in _DEFAULTS or v != _DEFAULTS[k]}


def adapter_config(model: PeftModel | LoraConfig) -> dict[str, Any]:
    """The PEFT configuration as plain, ordered JSON values, without defaults and without a local base model's path."""
    record: dict[str, Any] = (model.peft_config["default"] if isinstance(model, PeftModel) else model).to_dict()
    base = record.get("base_model_name_or_path")
    if base and Path(base).exists():
        record["base_model_name_or_path"] = hub_id(Path(base))
    record["inference_mode"] = True
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in sorted(record.items())}
    return without_defaults(json.loads(json.dumps(plain)))


def read_any_adapter(directory: Path, proxy: Path | None) -> tuple[dict[str, Any], dict[str, torch.Tensor], Manifest]:
    """Read an adapter as `read_adapter`, or, where PEFT wrote it and its proxy is given, as `plain_adapter`."""
    directory = Path(directory)
    if proxy is not None and not (directory / MANIFEST).is_file() and (directory / CONFIG_FILE).is_file():
        return plain_adapter(directory, Path(proxy))
    return read_adapter(directory)


def plain_adapter(directory: Path, proxy: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], Manifest]:
    """Read an adapter that PEFT, or TRL with it, trained on a proxy; the proxy says which blocks it is of.

    What the configuration matches the names of modules with is replaced by the names of the modules that the tensors
    are of, so that no pattern from outside is ever used.

    Returns:
        As of `read_adapter`.

    Raises:
        ArtifactError: as of `read_adapter`; or `proxy` is no proxy, the adapter was trained on another model, its
            tensors are not those of its target modules, or its configuration has settings that PEFT does not know here.
    """
    source = Manifest.read(proxy) if (proxy / MANIFEST).is_file() else None
    if source is None or source.kind != "proxy":
        raise ArtifactError(f"{proxy} is no proxy. Give the one that {directory} was trained on.")
    settings = {"healed": bool(source.settings.get("healed")), "trained_with": "PEFT"}
    manifest = replace(source, kind="proxy-adapter", scores=None, settings=settings, calibration_sha256=None)
    path, file = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    config = read_json(path, CONFIG_BYTES)
    check_config({**config, **_NO_PATTERN} if isinstance(config, dict) else config, path)
    if unknown := sorted(name for name, value in config.items() if name not in _DEFAULTS and value):
        raise ArtifactError(f"{path} uses {unknown}, which PEFT {peft.__version__} does not know.")
    base = config.get("base_model_name_or_path")
    if (
        isinstance(base, str)
        and (Path(base) / CONFIG).is_file()
        and model_identity(Path(base)) != model_identity(proxy)
    ):
        raise ArtifactError(f"{directory} was trained on {base!r}, as its {CONFIG_FILE} says, which is not {proxy}.")
    tensors = load_tensors(file)
    check_layout(tensors, config, manifest, file)
    check_finite(tensors, str(file))
    modules = {parameter_name(name).rpartition(".")[0] for name in tensors if is_lora(name)}
    check_targets(config.get("target_modules"), modules, path)
    return {**config, **_NO_PATTERN, "target_modules": sorted(modules)}, tensors, manifest


def held_adapter(
    adapter: PeftModel | Mapping[str, torch.Tensor], config: LoraConfig | None, manifest: Manifest
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and tensors of an adapter in memory (of a state dict the former is given), checked as on disk.

    Raises:
        UsageError: it is neither, or a state dict comes without its configuration.
        ArtifactError: as of `read_adapter`.
    """
    what: Any = config
    if isinstance(adapter, PeftModel) and "default" in adapter.peft_config:
        what = adapter.peft_config["default"]
        adapter = dict(get_peft_model_state_dict(adapter, save_embedding_layers=False))
    if not isinstance(what, LoraConfig) or not isinstance(adapter, Mapping):
        raise UsageError(
            f"the adapter is a {type(adapter).__name__} with the config {type(what).__name__}. Give its directory, a "
            "PeftModel whose adapter is LoRA and called default, or a state dict and its LoraConfig as config."
        )
    record, tensors = adapter_config(what), {name: tensor.detach().cpu() for name, tensor in sorted(adapter.items())}
    check_config(record, Path("config"))
    check_layout(tensors, record, manifest, Path("the adapter"))
    check_finite(tensors, "the adapter")
    return record, tensors


def check_base(base: Path, manifest: Manifest) -> None:
    """Check that the checkpoint `base` is the model that an adapter with `manifest` counts the blocks of.

    Raises:
        ArtifactError: it is another model, or a proxy with another layer map.
    """
    base = Path(base)
    if manifest.kind == "proxy-adapter":
        proxy = Manifest.read(base) if (base / MANIFEST).is_file() else None
        if proxy is None or proxy.kind != "proxy":
            raise ArtifactError(f"{base} is no proxy, but the adapter was trained on one. Fuse the adapter first.")
        if (proxy.llm_sha256, proxy.layer_map) != (manifest.llm_sha256, manifest.layer_map):
            raise ArtifactError(f"{base} is the proxy of another LLM, or keeps other blocks, than the adapter's.")
        return
    sha256 = model_identity(base)
    if sha256 != manifest.llm_sha256:
        raise ArtifactError(
            f"the adapter belongs to another LLM (sha256 {manifest.llm_sha256[:12]}…) than {base} ({sha256[:12]}…)."
        )


def load_with_adapter(
    base: str | Path, adapter: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PeftModel:
    """Load a checkpoint and put a trained adapter on it.

    Args:
        base: The proxy (for a "proxy-adapter") or the LLM (for an "llm-adapter"): directory or Hub id.
        adapter: Directory of the adapter.
        dtype: Data type of the base; its own if none.
        trust_remote_code: Let the base's own Python code run.

    Returns:
        The model with its adapter, in evaluation state, nothing trainable.

    Raises:
        ArtifactError: either is damaged, or the adapter does not fit the base.
    """
    directory = resolve(base)
    config, tensors, manifest = read_any_adapter(Path(adapter), directory)
    check_base(directory, manifest)
    return put_on(load_model(directory, dtype=dtype, trust_remote_code=trust_remote_code), config, tensors)


def put_on(model: PreTrainedModel, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> PeftModel:
    """Put a trained adapter, as `read_adapter` gives it, on a model, which PEFT changes in place.

    Raises:
        ArtifactError: it does not fit.
    """
    try:
        adapted = _wrap(model, LoraConfig(**{**config, "inference_mode": True}))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the adapter's {CONFIG_FILE} does not fit {type(model).__name__}: {error}") from error
    set_adapter_state(adapted, {name: tensor for name, tensor in tensors.items() if is_lora(name)})
    if weights := {name: tensor for name, tensor in tensors.items() if not is_lora(name)}:
        try:
            result: Any = set_peft_model_state_dict(adapted, weights)
        except RuntimeError as error:
            raise ArtifactError(f"the adapter does not fit the model: {error}") from error
        if unknown := result.unexpected_keys:
            raise ArtifactError(
                f"the adapter does not fit the model: {len(unknown)} tensors are unknown {unknown[:3]}."
            )
    return adapted.eval()
