"""What a state dict is, by its names alone: an adapter, a base, or a whole model with an adapter in it."""

from __future__ import annotations

from registry.core.layout import Layout
from registry.core.tensor_names import is_adapter_tensor

EMBEDDINGS = ("embed_tokens", "lm_head")
"""What PEFT saves beside an adapter without being asked (its `EMBEDDING_LAYER_NAMES`)."""


def kind_of(layout: Layout) -> str:
    """Adapter where there are adapter tensors without a base, checkpoint where there are both, else base.

    Full copies of modules (`modules_to_save`) cannot be told from a base by their names alone: for an adapter decides
    the prefix that PEFT gives a file, where none of the weights that adapters wrap is there.
    """
    plain = [spec.name for spec in layout if not is_adapter_tensor(spec.name)]
    if len(layout) and not plain:
        return "adapter"
    if len(plain) == len(layout):
        return "base"
    prefixed = all(spec.name.startswith("base_model.model.") for spec in layout)
    return "adapter" if prefixed and not any(map(_is_wrapped_weight, plain)) else "checkpoint"


def _is_wrapped_weight(name: str) -> bool:
    """Whether it is the weight under an adapter. PEFT saves some of their tensors with the adapter: trained biases,
    and unasked whole embeddings."""
    path, wrapped, part = name.partition(".base_layer.")
    return bool(wrapped) and part != "bias" and path.rpartition(".")[2] not in EMBEDDINGS
