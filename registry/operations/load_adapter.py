"""Loading an adapter into a model: one that carries an adapter of the same form already, or a plain
base, which is then wrapped as PEFT does it. Tensors are compared under their canonical names, so it does not matter
what adapter or wrapper stood in the names that were pushed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from registry.core.adapter_config import (
    AdapterConfig,
    canonical_config,
    config_findings,
    is_off,
    unknown_keys,
)
from registry.core.adapter_names import Target, canonical_name, is_adapter_tensor, targets_of
from registry.core.content_digest import LORA_OPTIONS, OUTSIDE, PLAIN_INITS
from registry.core.errors import Incompatible, InvalidInput
from registry.core.findings import Finding
from registry.core.layout import Layout
from registry.formats.live import (
    adapter_tensors,
    choose_adapter,
    find_adapted,
    live_config,
    tensor_spec,
)
from registry.formats.live_scaling import scaling_findings
from registry.formats.module_state import ModuleState
from registry.formats.tuner_layers import refuse_disabled, refuse_merged
from registry.operations.copying import copy_into, differences, memory, memory_of, same_values, settle

if TYPE_CHECKING:
    import torch
    from torch import nn

_SEEN_IN_TENSORS = {
    *("bias", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"),
    *("r", "rank_pattern", "target_modules", "target_parameters"),
}
"""Configuration keys that say which modules have which tensors: their names and shapes are compared themselves."""
_FOR_TRAINING = {
    *("auto_mapping", "beta1", "beta2", "deltaT", "inference_mode", "init_r", "orth_reg_weight"),
    *("peft_version", "target_r", "tfinal", "tinit", "total_step"),
}
REACHING_OUT = ("megatron_config", "adapters")
"""Options by which an artifact makes PEFT import or fetch what it names (some releases check the name, some do not)."""
_PEFT_ERRORS = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


def load_adapter(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    config: AdapterConfig | None,
    *,
    adapter_name: str | None,
    strict: bool,
    what: str,
    findings: Sequence[Finding] = (),
) -> nn.Module:
    """Copies an adapter into a model; see `Registry.load`.

    Args:
        findings: what the rules of `registry.compat` say of it and the model.

    Returns:
        The model, or the PeftModel that now holds it.

    Raises:
        Incompatible: with all differences; the model is unchanged.
    """
    named = _by_canonical_name(tensors, what)
    layout = Layout(tuple(tensor_spec(name, tensor) for name, tensor in named.items()))
    targets, _ = targets_of(layout, config)
    if config is not None:
        _refuse_unknown_config(config, what)
    holder = find_adapted(model)
    if holder is None:
        if config is None:
            raise InvalidInput(
                f"{what} has no configuration, so an adapter cannot be made for a plain model: "
                "wrap the model with get_peft_model first, with the r and lora_alpha that it was trained with"
            )
        settle(findings, strict=strict, what=f"{what} does not fit this {type(model).__name__}")
        return _wrap(model, named, config, targets, adapter_name or "default", strict=strict, what=what)
    refuse_merged(holder)
    refuse_disabled(holder, what)
    name = choose_adapter(holder, adapter_name)
    _put(holder, name, named, config, targets, strict=strict, what=what, findings=findings)
    return model


def checkpoint_findings(model: nn.Module, config: AdapterConfig | None, layout: Layout) -> list[Finding]:
    """What a model does otherwise with a checkpoint's adapter than the configuration that came with it says; a model
    without an adapter has none of its tensors, which copying finds."""
    holder = None if config is None else find_adapted(model)
    if holder is None or config is None:
        return []
    name = choose_adapter(holder, None)
    targets, _ = targets_of(layout, config)
    return [*option_findings(holder, name, config), *scaling_findings(holder, name, config, targets)]


def _by_canonical_name(tensors: Mapping[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    first: dict[str, str] = {}
    for name in tensors:
        other = first.setdefault(canonical_name(name), name)
        if other != name:
            message = "two tensors are one without wrappers and adapter names"
            raise Incompatible(
                f"{what} holds more than one adapter; nothing was changed",
                [Finding("C23", "error", name, message, "one adapter", other, "push one adapter at a time")],
            )
    return {canonical: tensors[name] for canonical, name in first.items()}


def _refuse_unknown_config(config: AdapterConfig, what: str) -> None:
    errors = [finding for finding in config_findings(config) if finding.severity == "error"]
    if errors:
        raise Incompatible(f"the installed PEFT does not know how {what} is computed; nothing was changed", errors)


# ---------------------------------------------------------------- into a model that carries an adapter


def _put(
    holder: nn.Module,
    adapter_name: str,
    tensors: Mapping[str, torch.Tensor],
    config: AdapterConfig | None,
    targets: tuple[Target, ...],
    *,
    strict: bool,
    what: str,
    findings: Sequence[Finding] = (),
) -> None:
    places = {canonical_name(name): (name, tensor) for name, tensor in adapter_tensors(holder, adapter_name).items()}
    aliases = {canonical: tensor for canonical, (_, tensor) in places.items()}
    found = [
        *findings,
        *option_findings(holder, adapter_name, config),
        *scaling_findings(holder, adapter_name, config, targets),
    ]
    own = memory_of(holder)
    if all(tensor.is_meta or not tensor.numel() or memory(tensor) in own for tensor in aliases.values()):
        copy_into(holder, aliases, tensors, strict=strict, what=what, findings=found)
        return
    # Strict in any case: PEFT sets all of them or none.
    settle([*found, *differences(aliases, tensors)], strict=True, what=f"{what} does not fit this adapter")
    saved = {places[canonical][0]: tensor.clone() for canonical, tensor in tensors.items()}
    _put_through_peft(holder, adapter_name, saved, what)


def _put_through_peft(holder: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor], what: str) -> None:
    """For tuners that save something computed (prompts, sparse indices): PEFT sets it, and must then save the same.

    Args:
        tensors: under the names that PEFT saves.
    """
    from peft import set_peft_model_state_dict

    of_adapters = [
        tensor for name, tensor in (*holder.named_parameters(), *holder.named_buffers()) if is_adapter_tensor(name)
    ]
    before = ModuleState(holder, values=of_adapters)
    try:
        set_peft_model_state_dict(holder, tensors, adapter_name=adapter_name)
        after = adapter_tensors(holder, adapter_name)
        computed = [name for name, tensor in tensors.items() if not same_values(after[name], tensor)]
        if computed:
            message = "the model computes it from other parameters, so it cannot be set"
            mend = "pull it as a PEFT folder and give that to PeftModel.from_pretrained with the plain base"
            raise Incompatible(
                f"{what} does not fit this adapter; nothing was changed",
                [Finding("C21", "error", canonical_name(name), message, mend=mend) for name in computed],
            )
    except _PEFT_ERRORS as error:
        before.restore()
        raise Incompatible(f"{what} does not fit this adapter; nothing was changed: PEFT says: {error}") from error
    except BaseException:
        before.restore()
        raise


def option_findings(holder: Any, adapter_name: str, config: AdapterConfig | None) -> list[Finding]:
    """C10: options that change what the adapter computes, and that names and shapes need not show."""
    if config is None:
        return []
    live = live_config(holder, adapter_name)
    mend = "build the adapter with the version's options"
    if live.peft_type != config.peft_type:
        message = "the model's adapter is of another type"
        return [Finding("C10", "error", "peft_type", message, config.peft_type, live.peft_type, mend)]
    expected, actual = canonical_config(config), canonical_config(live)
    keys = {*LORA_OPTIONS, *unknown_keys(config)}
    if config.peft_type != "LORA":
        keys = {key for key in (*expected, *actual) if "dropout" not in key and not key.startswith("init_")}
        keys -= OUTSIDE | _SEEN_IN_TENSORS | _FOR_TRAINING
    return [
        Finding("C10", "error", key, "the option differs", _short(expected.get(key)), _short(actual.get(key)), mend)
        for key in sorted(keys)
        if expected.get(key) != actual.get(key) and not (is_off(expected.get(key)) and is_off(actual.get(key)))
    ]


def _short(value: object) -> str:
    return repr(value)[:80]


# ---------------------------------------------------------------- into a plain base


def _wrap(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    config: AdapterConfig,
    targets: tuple[Target, ...],
    adapter_name: str,
    *,
    strict: bool,
    what: str,
) -> nn.Module:
    """Wraps a plain base. What can be told without touching it is told first; should PEFT then build
    something else than the version holds, or nothing at all, the wrapping is undone."""
    from peft import get_peft_model

    misfit = f"{what} does not fit this {type(model).__name__}"
    peft_config = make_peft_config(config, what)
    peft_config.base_model_name_or_path = vars(model).get("name_or_path") or None
    training = [(module, module.training) for module in model.modules()]
    # PiSSA, OLoRA and the like change the base's weights in place, which ones is PEFT's affair.
    plain = config.init_lora_weights is None or config.init_lora_weights in PLAIN_INITS
    before = ModuleState(model, values=() if plain else [one for one in model.parameters() if not one.is_meta])
    try:
        try:
            wrapped: Any = get_peft_model(model, peft_config, adapter_name=adapter_name)
        except _PEFT_ERRORS as error:
            raise Incompatible(f"{misfit}; nothing was changed: PEFT says {type(error).__name__}: {error}") from error
        _put(wrapped, adapter_name, tensors, config, targets, strict=strict, what=what)
    except BaseException:
        before.restore()
        raise
    wrapped.peft_config[adapter_name].base_model_name_or_path = config.base_model
    wrapped.train(model.training)
    for module, flag in training:
        module.training = flag
    loaded: nn.Module = wrapped
    return loaded


def make_peft_config(config: AdapterConfig, what: str) -> Any:
    """The installed PEFT's configuration object.

    Raises:
        Incompatible: it has no such tuner or option, or does not take the value of one.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for option in REACHING_OUT:
        if not is_off(config.document.get(option)):
            raise Incompatible(
                f"{what} has the option {option}, by which PEFT imports a module or loads other adapters that it "
                "names; build the model yourself, and load into that"
            )
    kind: Any = {str(key.value): value for key, value in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(config.peft_type)
    known = {field.name for field in fields(kind)} if kind else set()
    document = {key: value for key, value in config.document.items() if key in known}
    dropped = sorted(key for key, value in config.document.items() if key not in known and not is_off(value))
    if kind is None or dropped:
        subject = f"tuner {config.peft_type}" if kind is None else f"option {', '.join(dropped)}"
        raise Incompatible(f"the installed PEFT has no {subject}, which {what} needs; nothing was changed")
    document["inference_mode"] = True
    try:
        return kind(**document)
    except _PEFT_ERRORS as error:
        raise Incompatible(f"the installed PEFT does not take the configuration of {what}: {error}") from error
