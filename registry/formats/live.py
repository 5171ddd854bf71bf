"""Readers of what lives in memory: a PeftModel, a module, a state dict. torch and peft are imported
here, when something live is pushed and not before."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from registry.core.adapter_config import AdapterConfig, adapter_config
from registry.core.adapter_names import targets_of
from registry.core.errors import InvalidInput, UnsupportedTensor
from registry.core.layout import DTYPE_BITS, Layout, TensorSpec
from registry.core.reference import shown
from registry.formats.kinds import kind_of
from registry.formats.live_scaling import scaling_findings
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_TENSORS
from registry.formats.source import PlainFileInMemory, Source, TensorFileInMemory
from registry.formats.tuner_layers import refuse_merged, tuner_layers

if TYPE_CHECKING:
    import torch
    from torch import nn

MODEL_TENSORS = "model.safetensors"
_TORCH_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float4_e2m1fn_x2": "F4",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}


def read_live(source: object, *, kind: str | None = None, adapter_name: str | None = None) -> Source:
    """Reads a PeftModel, a module that holds exactly one, any other module, or a state dict.

    Args:
        kind: `checkpoint` takes the whole of a model with an adapter, not the adapter alone.
        adapter_name: which adapter of the model; its active one by default.

    Raises:
        InvalidInput: none of these, a merged adapter, or several to choose from.
        UnsupportedTensor: a tensor that safetensors cannot hold.
    """
    from torch import nn

    if isinstance(source, nn.Module):
        refuse_merged(source)
        adapted = find_adapted(source)
        if adapted is None:
            return _state_dict(source.state_dict(), "live module", kind)
        if kind == "checkpoint":
            return _checkpoint(source, adapted)
        if kind == "base":
            raise InvalidInput("the model carries an adapter; push the base before it is wrapped, or kind='checkpoint'")
        return _adapter(adapted, choose_adapter(adapted, adapter_name))
    if isinstance(source, Mapping):
        return _state_dict(source, "state dict", kind)
    raise InvalidInput(
        f"cannot push a {type(source).__name__}: expected a path, a PeftModel, a torch module or a state dict"
    )


def find_adapted(module: nn.Module) -> nn.Module | None:
    """The module itself, or the one within it, that carries adapters: a PeftModel, else a model into which PEFT put
    its layers, as transformers, diffusers and `inject_adapter_in_model` do. None where nothing does.

    Raises:
        InvalidInput: it holds several.
    """
    if "peft" not in sys.modules:
        return None
    from peft import PeftModel

    held: list[nn.Module] = [child for child in module.modules() if isinstance(child, PeftModel)]
    if not held:
        # PEFT sets `peft_config` on its own wrappers and on the model within: of those around the same layers, the
        # innermost has the names that PEFT saves.
        innermost: dict[frozenset[int], nn.Module] = {}
        for child in module.modules():
            layers = frozenset(map(id, tuner_layers(child))) if vars(child).get("peft_config") else None
            if layers:
                innermost[layers] = child
        held = list(innermost.values())
    if len(held) > 1:
        raise InvalidInput(
            f"the {type(module).__name__} holds {len(held)} models with adapters; give one of them by itself"
        )
    return held[0] if held else None


def choose_adapter(model: Any, adapter_name: str | None) -> str:
    """The adapter to take.

    Raises:
        InvalidInput: unknown, or not exactly one is active and none is named.
    """
    from peft import PeftModel

    known = list(model.peft_config)
    if adapter_name is not None:
        if adapter_name not in known:
            raise InvalidInput(f"the model has no adapter {adapter_name!r}; it has {', '.join(known)}")
        return adapter_name
    # An X-LoRA lists the adapters that it weighs among its own.
    active: list[str] = [name for name, config in model.peft_config.items() if config.peft_type == "XLORA"]
    if not active and isinstance(model, PeftModel):
        active = list(model.active_adapters)
    elif not active:
        active = list(dict.fromkeys(name for layer in tuner_layers(model) for name in layer.active_adapters))
    if len(active) != 1:
        raise InvalidInput(
            f"{len(active)} of the adapters {', '.join(known)} are active ({', '.join(active)}); "
            "name one with adapter_name="
        )
    return active[0]


def adapter_tensors(model: Any, adapter_name: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names that PEFT saves, never asking a hub for the base's vocabulary."""
    from peft import PeftModel, get_peft_model_state_dict

    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=_embeddings_belong(model, adapter_name)
    )
    if isinstance(model, PeftModel):
        return tensors
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


def _embeddings_belong(model: Any, adapter_name: str) -> bool:
    """What PEFT's `auto` decides, from the disk alone: embeddings are saved when they are targeted, or
    when the vocabulary is not the base's any more."""
    from peft.utils.other import EMBEDDING_LAYER_NAMES, match_target_against_key

    config = model.peft_config[adapter_name]
    base = base_of(model)
    if not hasattr(base, "get_input_embeddings"):
        return False
    targets = getattr(config, "target_modules", None) or ()
    if isinstance(targets, str):
        paths = [path for path, _ in base.named_modules() if path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
        targeted = targets != "all-linear" and any(match_target_against_key(targets, path) for path in paths)
    else:
        targeted = any(name in targets for name in EMBEDDING_LAYER_NAMES)
    by_token = getattr(config, "trainable_token_indices", None) is not None or config.peft_type == "TRAINABLE_TOKENS"
    if targeted and not by_token:
        return True
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    saved = _saved_vocabulary(getattr(config, "base_model_name_or_path", None))
    return vocabulary is not None and saved is not None and vocabulary != saved


def base_of(model: Any) -> Any:
    """The model within a PeftModel, with the adapter's layers in it; another model is its own base."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _saved_vocabulary(model_id: str | None) -> int | None:
    if not model_id:
        return None
    from pathlib import Path

    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path: Any = Path(model_id) / "config.json"
    if not path.is_file():
        try:
            path = try_to_load_from_cache(model_id, "config.json")
        except HFValidationError:
            return None
        if not isinstance(path, str):
            return None
    try:
        size = json.loads(Path(path).read_bytes()).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def _adapter(model: Any, name: str) -> Source:
    # An X-LoRA is saved without the adapters that it weighs.
    types = sorted({str(one.peft_type.value) for one in model.peft_config.values()} - {"XLORA"})
    if len(types) > 1:
        raise InvalidInput(
            f"the model mixes adapters of the types {', '.join(types)}, layer on layer, and PEFT saves none of them "
            "alone; push kind='checkpoint'"
        )
    config = live_config(model, name)
    text = json.dumps(config.document, indent=2, sort_keys=True).encode("utf-8")
    file = tensor_file(ADAPTER_TENSORS, "adapter", adapter_tensors(model, name))
    _refuse_rescaled(model, name, config, file.layout)
    others = sorted(set(map(str, model.peft_config)) - {name})
    return Source(
        form="live model with an adapter",
        kind="adapter",
        tensor_files=(file,),
        plain_files=(PlainFileInMemory(ADAPTER_CONFIG, text),),
        config=config,
        # PEFT fills it in when a configuration is made, and keeps that of the file that one was read from.
        peft_version=model.peft_config[name].peft_version,
        notes=(f"pushed the adapter {name} alone; left out: {', '.join(map(shown, others))}",) if others else (),
    )


def _checkpoint(whole: nn.Module, adapted: Any) -> Source:
    """A model with its adapter in it. With one adapter its configuration is kept: without lora_alpha the tensors alone
    do not say what the model computes."""
    source = _state_dict(whole.state_dict(), "live model with an adapter", "checkpoint")
    names = list(adapted.peft_config)
    if len(names) != 1:
        source.notes = (f"it holds {len(names)} adapters, so no configuration is kept and no lora_alpha is checked",)
        return source
    source.config = live_config(adapted, names[0])
    source.peft_version = adapted.peft_config[names[0]].peft_version
    _refuse_rescaled(adapted, names[0], source.config, source.tensor_files[0].layout)
    return source


def _refuse_rescaled(model: Any, name: str, config: AdapterConfig, layout: Layout) -> None:
    """
    Raises:
        InvalidInput: the live layers are not scaled as the configuration says: what is pushed would not be what runs.
    """
    rescaled = scaling_findings(model, name, config, targets_of(layout, config)[0])
    if rescaled:
        first = rescaled[0]
        raise InvalidInput(
            f"{len(rescaled)} layers of the model are not scaled as its configuration says, {first.subject} first: "
            f"expected {first.expected}, found {first.found}; undo it (unscale_layer, set_scale), or write it into "
            "lora_alpha"
        )


def live_config(model: Any, name: str) -> AdapterConfig:
    """A live adapter's configuration as `save_pretrained` writes it, with sets sorted and without the
    PEFT version, so that one adapter has one form in every process."""
    document = dict(model.peft_config[name].to_dict())
    document.pop("peft_version", None)
    document.pop("runtime_config", None)
    document["inference_mode"] = True
    base = base_of(model)
    if document.get("base_model_name_or_path") is None:
        document["base_model_name_or_path"] = vars(base).get("name_or_path") or None
    if document.get("task_type") is None:
        document["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return adapter_config(document)


def _state_dict(tensors: Mapping[Any, Any], form: str, wanted: str | None) -> Source:
    if not tensors:
        raise InvalidInput(f"the {form} holds no tensors; there is nothing to keep")
    file = tensor_file(MODEL_TENSORS, "model", tensors)
    kind = kind_of(file.layout)
    notes: tuple[str, ...] = ()
    if (wanted or kind) == "adapter" and kind != "base":
        file.path = ADAPTER_TENSORS
        file.rename_component("model", "adapter")
        notes = ("pushed without a configuration, so lora_alpha is unknown",)
    return Source(form=form, kind=kind, tensor_files=(file,), notes=notes)


def tensor_file(
    path: str, role: str, tensors: Mapping[Any, Any], metadata: Mapping[str, str] | None = None
) -> TensorFileInMemory:
    """A safetensors file of these tensors, in the order in which the safetensors library writes them: by dtype, the
    last one in its list first, then by name.

    Args:
        metadata: for its header, beside `format`.

    Raises:
        UnsupportedTensor, InvalidInput, MalformedTensors: names the tensor.
    """
    specs = [(tensor_spec(name, value), value) for name, value in tensors.items()]
    rank = {dtype: place for place, dtype in enumerate(DTYPE_BITS)}
    specs.sort(key=lambda pair: (-rank[pair[0].dtype], pair[0].name))
    layout = Layout(tuple(spec for spec, _ in specs))
    return TensorFileInMemory(path, role, layout, [partial(tensor_bytes, value) for _, value in specs], metadata)


def dtype_code(dtype: torch.dtype) -> str | None:
    """The safetensors code of a torch dtype; None where it has none."""
    return _TORCH_NAMES.get(str(dtype).removeprefix("torch."))


def tensor_spec(name: object, value: Any) -> TensorSpec:
    """A live tensor's place in a layout.

    Raises:
        UnsupportedTensor: safetensors cannot hold it.
        InvalidInput: the name is no text.
    """
    import torch

    if not isinstance(name, str) or not name or "\x00" in name:
        raise InvalidInput(f"tensor name {shown(repr(name))} is not a non-empty text without NUL")
    if not isinstance(value, torch.Tensor):
        raise UnsupportedTensor(f"{shown(name)}: expected a tensor, found {type(value).__name__}; leave it out")
    refused = not_plain(value)
    code = dtype_code(value.dtype)
    if refused is None and code is None:
        refused = (f"dtype {value.dtype}", "convert it to a dtype that safetensors has")
    if refused is not None or code is None:
        found, mend = refused or ("", "")
        raise UnsupportedTensor(f"{shown(name)}: safetensors cannot hold {found}; {mend}")
    shape = tuple(value.shape)
    if code == "F4":
        if not shape:
            raise UnsupportedTensor(f"{shown(name)}: a scalar of packed 4-bit floats has no safetensors form")
        shape = (*shape[:-1], shape[-1] * 2)
    return TensorSpec(name, code, shape)


def not_plain(value: torch.Tensor) -> tuple[str, str] | None:
    """What a tensor is instead of elements in memory, and the mend; None where it is just that."""
    import torch
    from torch.nn.parameter import is_lazy

    if is_lazy(value):
        return "a parameter that has no shape yet", "run the model once first"
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        # DTensor, torchao's quantised tensors: what they show and what they store are two things.
        return f"a {type(value).__name__}", "turn it into a plain tensor first"
    if value.is_meta:
        return "a meta tensor without data", "load the weights first"
    if value.is_quantized:
        return f"a quantised tensor ({value.dtype})", "dequantize() it first"
    if value.layout != torch.strided or value.is_nested:
        return f"a {'nested' if value.is_nested else value.layout} tensor", "turn it into a dense tensor first"
    return None


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Row-major bytes of a tensor on any device; no copy for a contiguous one on the CPU."""
    return flat_bytes(tensor).numpy().data


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same as a tensor of U8 on the CPU."""
    import torch

    plain = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().cpu()
    return plain.contiguous().reshape(-1).view(torch.uint8)
