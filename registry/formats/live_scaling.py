"""The scaling of a live adapter's layers against the one that a configuration gives them. A model can be rescaled after
its configuration was written (`set_scale`, `scale_layer`), and nothing in its tensors shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from registry.core.adapter_config import AdapterConfig
from registry.core.adapter_names import Target, canonical_name, target_scaling
from registry.core.findings import Finding
from registry.core.tensor_names import without_layers
from registry.formats.tuner_layers import tuner_layers

if TYPE_CHECKING:
    from torch import nn


def scaling_findings(
    holder: nn.Module,
    adapter_name: str,
    config: AdapterConfig | None,
    targets: Iterable[Target],
    mend: str = "build the adapter with the lora_alpha and use_rslora of the version",
) -> list[Finding]:
    """C10: layers whose live scaling is not lora_alpha / r (or / sqrt(r) with rsLoRA) as the configuration has it."""
    if config is None:
        message = "the version has no configuration, so its scaling could not be compared with the model's"
        return [Finding("C10", "warning", "", message, mend="push the adapter with its configuration")]
    by_path = {target.module: target for target in targets}
    found = []
    for layer, path in tuner_layers(holder).items():
        live = getattr(layer, "scaling", None)
        target = _target_of(layer, path, by_path)
        if target is None or not isinstance(live, Mapping) or adapter_name not in live:
            continue
        expected = target_scaling(config, target)
        actual = float(live[adapter_name])
        if expected is not None and abs(actual - expected) > 1e-9 * max(1.0, abs(expected)):
            found.append(
                Finding("C10", "error", target.module, "the scaling differs", f"{expected:g}", f"{actual:g}", mend)
            )
    return found


def _target_of(layer: Any, path: str, targets: Mapping[str, Target]) -> Target | None:
    """The target that a live layer is; two parameters of one module are told apart by PEFT's nesting alone."""
    inner = canonical_name(f"{path}.lora_A").removesuffix(".lora_A")  # it takes names of tensors
    bare = ".".join(without_layers(inner.split(".")))
    names = [inner, bare]
    if hasattr(layer, "parameter_name"):
        names = [f"{bare}.{layer.parameter_name}", inner]
    return next((targets[name] for name in names if name in targets), None)
