"""Which modules LoRA targets name: linear layers whose dotted name has `encoder` or `decoder` in it (`apply_to`) and
one of the targets as a part. PEFT's own rule (suffixes, expressions) is another one, so names are resolved here and
PEFT gets whole paths. Two configurations are the same where they resolve to the same modules."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from torch import nn

from pdp.errors import TargetsNotFound
from registry.core.errors import InvalidInput
from registry.core.reference import shown

APPLY_TO = {"encoder": ("encoder",), "decoder": ("decoder",), "both": ("encoder", "decoder")}
"""The words of `apply_to`, and which of them a module's name must contain."""


def check_apply_to(apply_to: object) -> str:
    """The value itself where it is one of the words.

    Raises:
        InvalidInput
    """
    if isinstance(apply_to, str) and apply_to in APPLY_TO:
        return apply_to
    near = get_close_matches(str(apply_to), APPLY_TO, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidInput(f"apply_to is {shown(repr(apply_to))}; expected one of {', '.join(APPLY_TO)}{hint}")


def check_targets(target_modules: object) -> tuple[str, ...]:
    """Targets as a sorted tuple of texts, each once; one text alone is one target.

    Raises:
        InvalidInput: none, or something that is no text.
    """
    given = [target_modules] if isinstance(target_modules, str) else target_modules
    if not isinstance(given, Iterable):
        raise InvalidInput(f"target_modules is {shown(repr(target_modules))}; expected a list of names")
    targets = list(given)
    wrong = next((one for one in targets if not isinstance(one, str) or not one), None)
    if wrong is not None:
        raise InvalidInput(f"target_modules has {shown(repr(wrong))} in it; expected names such as 'q_proj'")
    if not targets:
        raise InvalidInput("target_modules is empty; name the layers, such as ['q_proj', 'k_proj', 'out_proj']")
    return tuple(sorted(set(targets)))


def linear_layers(model: nn.Module, apply_to: str = "both") -> list[str]:
    """Paths of the linear layers that LoRA may target, in the order of the model. Of a model that carries LoRA already,
    the paths that they have without it.

    The output layer of torch's MultiheadAttention is left out: its forward reads the weight and never calls the
    layer, so an adapter there would do nothing.
    """
    words = APPLY_TO[check_apply_to(apply_to)]
    fused = {f"{path}.out_proj" for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    found: dict[str, None] = {}
    for path, module in model.named_modules():
        own = _without_lora(path)
        if (
            isinstance(module, nn.Linear)
            and own is not None
            and path not in fused
            and any(word in own for word in words)
        ):
            found[own] = None
    return list(found)


def resolve_targets(model: nn.Module, target_modules: object, apply_to: str = "both") -> list[str]:
    """Paths of the layers that the targets name, in the order of the model.

    Raises:
        TargetsNotFound: a target names none; the message has what there is.
        InvalidInput: targets or `apply_to` of another form.
    """
    targets = check_targets(target_modules)
    layers = linear_layers(model, apply_to)
    missing = [target for target in targets if not any(target in path for path in layers)]
    if missing:
        raise TargetsNotFound(_explained(model, missing, layers, apply_to))
    return [path for path in layers if any(target in path for target in targets)]


def _without_lora(path: str) -> str | None:
    """The path without PEFT's wrappers; None for a part of an adapter itself."""
    segments = path.split(".")
    if any(segment.startswith("lora_") and segment != "lora_model" for segment in segments):
        return None
    return ".".join(segment for segment in segments if segment != "base_layer")


def _explained(model: nn.Module, missing: Collection[str], layers: list[str], apply_to: str) -> str:
    kind = type(model).__name__
    where = "encoder or decoder" if apply_to == "both" else apply_to
    named = ", ".join(shown(repr(one)) for one in missing)
    text = f"target_modules {named} match no linear layer in the {where} of {kind}"
    fused = [path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    if fused:
        text += (
            f"; {len(fused)} of its attentions ({fused[0]}, ...) are torch's MultiheadAttention, which has queries, "
            "keys and values fused in one in_proj_weight, and no layers q_proj, k_proj, v_proj; use "
            "pdp.modules_v2.QKVTransformerForDiffusion, or target other layers"
        )
    names = sorted({path.rpartition(".")[2] for path in layers})
    if not names:
        outside = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        seen = f"; its linear layers are {', '.join(outside[:8])}" if outside else "; it has no linear layers at all"
        return text + f"; there is no linear layer with encoder or decoder in its name{seen}"
    parts = sorted({part for path in layers for part in path.split(".") if not part.isdigit()})
    near = [match for one in missing for match in get_close_matches(one, parts, n=1)]
    hint = f"did you mean {', '.join(map(repr, dict.fromkeys(near)))}? " if near else ""
    return f"{text}; {hint}there are {', '.join(names)}"
