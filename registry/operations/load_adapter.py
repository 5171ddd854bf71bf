"""Loading an adapter into a model: one that carries an adapter of the same form already, or a plain
base, which is then wrapped as PEFT does it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from registry.core.adapter_config import AdapterConfig, config_findings, scaling
from registry.core.adapter_names import Target, targets_of
from registry.core.errors import Incompatible
from registry.core.findings import Finding
from registry.core.layout import Layout
from registry.formats.live import (
    adapter_tensors,
    choose_adapter,
    find_peft_model,
    has_tuner_layers,
    refuse_merged,
    tensor_spec,
)
from registry.operations.load import copy_into, differences, refuse_without_config

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFIX = "base_model.model."


def load_adapter(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    config: AdapterConfig | None,
    *,
    adapter_name: str | None,
    strict: bool,
    what: str,
) -> nn.Module:
    """Copies an adapter into a model; see `Registry.load`.

    Returns:
        The model, or the PeftModel that now holds it.

    Raises:
        Incompatible: with all differences; the model is unchanged.
    """
    named = {_saved_name(name): tensor for name, tensor in tensors.items()}
    layout = Layout(tuple(tensor_spec(name, tensor) for name, tensor in named.items()))
    targets, _ = targets_of(layout, config)
    if config is not None:
        _refuse_unknown_config(config, what)
    peft_model = find_peft_model(model)
    holder: nn.Module | None = peft_model if peft_model is not None else (model if has_tuner_layers(model) else None)
    if holder is None:
        return _wrap(model, named, refuse_without_config(config, what), targets, adapter_name or "default", what)
    refuse_merged(holder)
    name = choose_adapter(holder, adapter_name)
    copy_into(
        holder,
        _places(holder, name),
        named,
        strict=strict,
        what=what,
        findings=tuple(scaling_findings(holder, name, config, targets)),
    )
    return model


def _saved_name(name: str) -> str:
    return name if name.startswith(PREFIX) else PREFIX + name


def _places(holder: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    return {_saved_name(name): tensor for name, tensor in adapter_tensors(holder, adapter_name).items()}


def _refuse_unknown_config(config: AdapterConfig, what: str) -> None:
    errors = [finding for finding in config_findings(config) if finding.severity == "error"]
    if errors:
        raise Incompatible(f"the installed PEFT does not know how {what} is computed; nothing was changed", errors)


def scaling_findings(
    holder: nn.Module, adapter_name: str, config: AdapterConfig | None, targets: tuple[Target, ...]
) -> list[Finding]:
    """C10: modules whose live scaling (lora_alpha / r, or / sqrt(r)) is not the one that was pushed."""
    if config is None:
        return []
    ranks = {target.module: target.rank for target in targets if target.rank}
    found = []
    for path, module in holder.named_modules():
        live = getattr(module, "scaling", None)
        inner = path.removeprefix(PREFIX)
        if not isinstance(live, Mapping) or adapter_name not in live or inner not in ranks:
            continue
        expected = scaling(config, inner, ranks[inner])
        if expected is not None and abs(live[adapter_name] - expected) > 1e-9 * max(1.0, abs(expected)):
            found.append(
                Finding(
                    "C10",
                    "error",
                    inner,
                    "the scaling differs",
                    f"{expected:g}",
                    f"{live[adapter_name]:g}",
                    "build the adapter with the lora_alpha and use_rslora of the version",
                )
            )
    return found


def _wrap(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    config: AdapterConfig,
    targets: tuple[Target, ...],
    adapter_name: str,
    what: str,
) -> nn.Module:
    """Wraps a plain base. What can be told without touching it is told first; should PEFT then build
    something else than the version holds, the wrapping is undone."""
    from peft import get_peft_model

    early = module_findings(model, targets)
    if early:
        raise Incompatible(f"{what} does not fit this {type(model).__name__}; nothing was changed", early)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    peft_config = make_peft_config(config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*")
        wrapped: Any = get_peft_model(model, peft_config, adapter_name=adapter_name)
    try:
        places = _places(wrapped, adapter_name)
        found = [*differences(places, tensors), *scaling_findings(wrapped, adapter_name, config, targets)]
        if found:
            raise Incompatible(f"{what} does not fit this {type(model).__name__}; nothing was changed", found)
        copy_into(wrapped, places, tensors, strict=True, what=what)
    except BaseException:
        if hasattr(wrapped.base_model, "unload"):
            wrapped.base_model.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable.get(name, parameter.requires_grad))
        raise
    wrapped.train(was_training)
    return wrapped  # type: ignore[no-any-return]  # peft is untyped here


def module_findings(model: nn.Module, targets: tuple[Target, ...]) -> list[Finding]:
    """Targets that the model has no module for, or one of other sizes."""
    from torch import nn

    modules = dict(model.named_modules())
    found = []
    for target in targets:
        module = modules.get(target.module)
        if module is None:
            if target.kind not in ("parameter",):
                mend = "is this the base that the adapter was trained on?"
                found.append(Finding("C05", "error", target.module, "the model has no such module", mend=mend))
            continue
        if isinstance(module, nn.Linear) and target.kind == "linear":
            sizes, wanted = (module.in_features, module.out_features), (target.in_features, target.out_features)
            if sizes != wanted:
                found.append(
                    Finding("C08", "error", target.module, "(in, out) features differ", str(sizes), str(wanted))
                )
    return found


def make_peft_config(config: AdapterConfig) -> Any:
    """The installed PEFT's configuration object. Keys that it does not know are dropped here only because
    `config_findings` has shown that they change nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config.peft_type)]
    known = {field.name for field in fields(kind)}
    document = {key: value for key, value in config.document.items() if key in known and key != "peft_version"}
    document["inference_mode"] = True
    return kind(**document)
