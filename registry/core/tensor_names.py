"""Names in state dicts: which wrappers and adapter names stand in them, which belong to a tuner, and what the same
tensor is called where nothing is wrapped. One name at a time, from the name alone; the words are in `peft_keys`.

What one name cannot tell: a file of an adapter keeps a module of `modules_to_save` under its plain name, and a base
model whose outermost attribute is called `module` looks like one inside DistributedDataParallel."""

from __future__ import annotations

from functools import lru_cache

from registry.core.peft_keys import (
    BY_MODULE,
    CONTAINERS,
    LISTS,
    MODULES,
    PROMPT_ENCODER_PARTS,
    RENAMED,
    TENSORS,
    TENSORS_OR_MODULES,
)

_WRAPPERS = (("base_model", "model"), ("base_model", "lora_model", "model"), ("module",))
"""PeftModel, X-LoRA's PeftModel, DistributedDataParallel: around the whole model, perhaps several times."""
_INNER_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""torch.compile, FSDP and activation checkpointing: around any module."""


@lru_cache(1 << 16)
def canonical_name(name: str, adapter_name: str | None = None) -> str:
    """The name without wrappers and without the adapter's name, as in a file of this adapter less `base_model.model.`.

    `base_model.model.x.q.lora_A.default.weight` and `base_model.model.x.q.lora_A.weight` both give `x.q.lora_A.weight`;
    `head.modules_to_save.default.weight` gives `head.weight`.

    Args:
        adapter_name: only this adapter's name is taken out; None takes out whatever stands where an adapter's name can.
            It has to be given for an adapter that is called `weight` or `bias`.
    """
    segments = _unwrapped(name)
    for place, segment in enumerate(segments):
        if segment == "modules_to_save" and place + 1 < len(segments):
            rest = segments[place + 1 :]
            if len(rest) > 1 and adapter_name in (None, rest[0]):
                rest = rest[1:]
            elif len(rest) > 1:
                break
            return ".".join(segments[:place] + rest)
        if segment in CONTAINERS:
            rest = _without_adapter(segment, segments[place + 1 :], adapter_name)
            return ".".join(segments[: place + 1] + rest)
    return ".".join(segments)


def is_adapter_tensor(name: str) -> bool:
    """Whether a state-dict name is one that PEFT gives: a tuner's part, or a live copy in `modules_to_save`."""
    segments = name.split(".")
    if any(segment in CONTAINERS or segment == "modules_to_save" for segment in segments):
        return True
    # `prompt_encoder` alone would not do: Segment Anything has a module of that name.
    return any(
        one == "prompt_encoder" and part in PROMPT_ENCODER_PARTS
        for one, part in zip(segments, segments[2:], strict=False)
    )


def base_name(name: str) -> str:
    """What a tensor of the base is called in the base model alone, given its name in a model with adapters.

    `base_model.model.q_proj.base_layer.weight` gives `q_proj.weight`, and so does `q_proj.original_module.weight`.
    """
    return ".".join(without_layers(_unwrapped(name)))


def without_layers(segments: list[str]) -> list[str]:
    """The segments less those that PEFT puts before a tensor of a module that it wraps.

    The first segment always stays: PEFT wraps no model itself, and there are models with a `base_layer` (DLA).
    """
    return [
        segment
        for place, segment in enumerate(segments)
        if place == 0 or segment not in ("base_layer", "original_module", "token_adapter")
    ]


@lru_cache(1 << 16)
def split_at_tuner(name: str) -> tuple[str, str, str] | None:
    """A canonical name as (path of the module, the tuner's name for its part, the rest); None if no tuner's name is in
    it."""
    segments = name.split(".")
    for place, segment in enumerate(segments):
        if segment in CONTAINERS:
            return ".".join(segments[:place]), segment, ".".join(segments[place + 1 :])
    return None


def _unwrapped(name: str) -> list[str]:
    segments = [segment for segment in name.split(".") if segment not in _INNER_WRAPPERS]
    start = 0
    while True:
        for wrapper in _WRAPPERS:
            end = start + len(wrapper)
            if end < len(segments) and tuple(segments[start:end]) == wrapper:
                start = end
                break
        else:
            return segments[start:]


def _without_adapter(container: str, rest: list[str], adapter_name: str | None) -> list[str]:
    """What follows a tuner's part, without the adapter's name."""
    if not rest:
        return rest
    own = adapter_name is None or rest[0] == adapter_name
    if container == "lora_magnitude_vector":
        # A file never has the `.weight` of the module that PEFT later made of this parameter.
        return [] if rest == ["weight"] or (own and rest[1:] in ([], ["weight"])) else rest
    if container in BY_MODULE:
        return rest[:1] if len(rest) == 2 and adapter_name in (None, rest[1]) else rest
    if not own:
        return rest
    if container in TENSORS:
        return [] if len(rest) == 1 else rest
    if container in TENSORS_OR_MODULES:
        return rest if rest in (["weight"], ["bias"]) else rest[1:]
    if container in MODULES:
        return rest[1:] if len(rest) > 1 else rest
    if container in LISTS:
        return rest[1:] if len(rest) > 1 and rest[1].isdigit() else rest
    if container in RENAMED:
        return ["default", *rest[1:]] if len(rest) > 1 else rest
    return rest
