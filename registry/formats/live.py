"""Readers of what lives in memory: a PeftModel, a module, a state dict. torch and peft are imported
here, when something live is pushed and not before."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from registry.core.adapter_config import AdapterConfig, adapter_config
from registry.core.errors import InvalidInput, UnsupportedTensor
from registry.core.layout import DTYPE_BITS, Layout, TensorSpec
from registry.core.reference import shown
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_TENSORS, kind_of
from registry.formats.source import PlainFile, Source, TensorBytes, TensorFileInMemory

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
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
        peft_model = find_peft_model(source)
        if peft_model is None:
            if has_tuner_layers(source):
                refuse_merged(source)
                if kind != "checkpoint":
                    return _injected_adapter(source, adapter_name)
            return _state_dict(source.state_dict(), "live module")
        refuse_merged(peft_model)
        if kind == "checkpoint":
            return _state_dict(source.state_dict(), "live PeftModel")
        if kind == "base":
            raise InvalidInput("the model carries an adapter; push the base before it is wrapped, or kind='checkpoint'")
        return _peft_adapter(peft_model, adapter_name)
    if isinstance(source, Mapping):
        return _state_dict(source, "state dict")
    raise InvalidInput(
        f"cannot push a {type(source).__name__}: expected a path, a PeftModel, a torch module or a state dict"
    )


def find_peft_model(module: nn.Module) -> PeftModel | None:
    """The module itself, or the one PeftModel that it holds.

    Raises:
        InvalidInput: it holds several.
    """
    if "peft" not in sys.modules:
        return None
    from peft import PeftModel

    if isinstance(module, PeftModel):
        return module
    held = [child for child in module.modules() if isinstance(child, PeftModel)]
    if len(held) > 1:
        raise InvalidInput(f"the {type(module).__name__} holds {len(held)} PeftModels; push one of them by itself")
    return held[0] if held else None


def has_tuner_layers(module: nn.Module) -> bool:
    """Whether adapters were injected into a plain module, as transformers and diffusers do."""
    if "peft" not in sys.modules or not getattr(module, "peft_config", None):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(child, BaseTunerLayer) for child in module.modules())


def refuse_merged(module: nn.Module) -> None:
    """
    Raises:
        InvalidInput: an adapter is merged into the weights, so neither it nor the base is there alone.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, child in module.named_modules():
        if isinstance(child, BaseTunerLayer) and child.merged:
            raise InvalidInput(
                f"the adapter is merged into its base (at {path}): call unmerge_adapter() before the push, "
                "or push merge_and_unload()'s result as a model of its own"
            )


def choose_adapter(model: Any, adapter_name: str | None) -> str:
    """The adapter to take.

    Raises:
        InvalidInput: unknown, or several are active and none is named.
    """
    known = list(model.peft_config)
    if adapter_name is not None:
        if adapter_name not in known:
            raise InvalidInput(f"the model has no adapter {adapter_name!r}; it has {', '.join(known)}")
        return adapter_name
    active = model.active_adapters
    names: list[str] = list(active() if callable(active) else active)
    if len(names) != 1:
        raise InvalidInput(f"{len(names)} adapters are active ({', '.join(names)}); name one with adapter_name=")
    return names[0]


def adapter_tensors(model: Any, adapter_name: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names that PEFT saves, never asking a hub for the base's vocabulary."""
    from peft import get_peft_model_state_dict

    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=_embeddings_belong(model, adapter_name)
    )
    return tensors


def _embeddings_belong(model: Any, adapter_name: str) -> bool:
    """What PEFT's `auto` decides, from the disk alone: embeddings are saved when they are targeted, or
    when the vocabulary is not the base's any more."""
    from peft.utils.other import EMBEDDING_LAYER_NAMES

    config = model.peft_config[adapter_name]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "get_input_embeddings"):
        return False
    tokens = getattr(config, "trainable_token_indices", None) is not None or config.peft_type == "TRAINABLE_TOKENS"
    targets = getattr(config, "target_modules", None)
    if targets and not isinstance(targets, str) and any(name in targets for name in EMBEDDING_LAYER_NAMES):
        return not tokens
    if isinstance(targets, str):
        from peft.utils.other import match_target_against_key

        embeddings = [n for n, _ in base.named_modules() if n.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
        if targets != "all-linear" and any(match_target_against_key(targets, name) for name in embeddings):
            return not tokens
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    saved = _saved_vocabulary(getattr(config, "base_model_name_or_path", None))
    return vocabulary is not None and saved is not None and vocabulary != saved


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


def _peft_adapter(model: PeftModel, adapter_name: str | None) -> Source:
    name = choose_adapter(model, adapter_name)
    return _adapter(model, name, adapter_tensors(model, name), "live PeftModel")


def _injected_adapter(model: nn.Module, adapter_name: str | None) -> Source:
    name = choose_adapter(model, adapter_name)
    tensors = {f"base_model.model.{key}": tensor for key, tensor in adapter_tensors(model, name).items()}
    return _adapter(model, name, tensors, "live model with adapters")


def _adapter(model: Any, name: str, tensors: Mapping[str, torch.Tensor], form: str) -> Source:
    import peft

    config = model.peft_config[name]
    config_document = live_config(model, name)
    text = json.dumps(config_document.document, indent=2, sort_keys=True).encode("utf-8")
    return Source(
        form=form,
        kind="adapter",
        tensor_files=(tensor_file(ADAPTER_TENSORS, "adapter", tensors),),
        plain_files=(PlainFile(ADAPTER_CONFIG, text),),
        config=config_document,
        peft_version=str(getattr(config, "peft_version", None) or peft.__version__),
    )


def live_config(model: Any, name: str) -> AdapterConfig:
    """A live adapter's configuration as `save_pretrained` writes it, with sets sorted and without the
    PEFT version, so that one adapter has one form in every process."""
    config = model.peft_config[name]
    document = {key: plain(value) for key, value in config.to_dict().items()}
    document.pop("peft_version", None)
    document.pop("runtime_config", None)
    document["inference_mode"] = True
    if document.get("base_model_name_or_path") is None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        document["base_model_name_or_path"] = getattr(base, "name_or_path", None) or None
    if document.get("auto_mapping") is None and document.get("task_type") is None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        kind = type(base)
        document["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return adapter_config(document)


def plain(value: Any) -> Any:
    """A configuration value as JSON has it: sets sorted, enums as their values."""
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return getattr(value, "value", value) if not isinstance(value, str | int | float | bool | None) else _bare(value)


def _bare(value: Any) -> Any:
    """A str or int without its enum class."""
    return str(value.value) if isinstance(value, str) and hasattr(value, "value") else value


def _state_dict(tensors: Mapping[Any, Any], form: str) -> Source:
    if not tensors:
        raise InvalidInput(f"the {form} holds no tensors; there is nothing to keep")
    file = tensor_file(MODEL_TENSORS, "model", tensors)
    kind = kind_of(file.layout, None)
    notes: tuple[str, ...] = ()
    if kind == "adapter":
        file.path, file.role = ADAPTER_TENSORS, "adapter"
        notes = ("pushed without a configuration, so lora_alpha is unknown",)
    return Source(form=form, kind=kind, tensor_files=(file,), notes=notes)


def tensor_file(path: str, role: str, tensors: Mapping[Any, Any]) -> TensorFileInMemory:
    """A safetensors file of these tensors, ordered as safetensors orders them: wide dtypes first, then by name.

    Raises:
        UnsupportedTensor, InvalidInput: names the tensor.
    """
    specs = [(tensor_spec(name, value), value) for name, value in tensors.items()]
    specs.sort(key=lambda pair: (-DTYPE_BITS[pair[0].dtype], pair[0].name))
    layout = Layout(tuple(spec for spec, _ in specs))
    return TensorFileInMemory(path, role, layout, [LiveTensor(value) for _, value in specs])


def tensor_spec(name: object, value: Any) -> TensorSpec:
    """A live tensor's place in a layout.

    Raises:
        UnsupportedTensor: safetensors cannot hold it.
    """
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not isinstance(name, str) or not name or "\x00" in name:
        raise InvalidInput(f"tensor name {shown(repr(name))} is not a non-empty text without NUL")
    if not isinstance(value, torch.Tensor):
        raise UnsupportedTensor(f"{shown(name)}: expected a tensor, found {type(value).__name__}; leave it out")
    found = None
    if is_traceable_wrapper_subclass(value):
        found, mend = f"a {type(value).__name__}", "turn it into a plain tensor first"
    elif value.is_meta:
        found, mend = "a meta tensor without data", "load the weights first"
    elif value.is_quantized:
        found, mend = f"a quantised tensor ({value.dtype})", "dequantize() it first"
    elif value.layout != torch.strided or value.is_nested:
        found, mend = f"a {value.layout} tensor", "to_dense() it first"
    code = _TORCH_NAMES.get(str(value.dtype).removeprefix("torch."))
    if found is None and code is None:
        found, mend = f"dtype {value.dtype}", "convert it to a dtype that safetensors has"
    if found is not None or code is None:
        raise UnsupportedTensor(f"{shown(name)}: safetensors cannot hold {found}; {mend}")
    shape = tuple(value.shape)
    if code == "F4":
        if not shape:
            raise UnsupportedTensor(f"{shown(name)}: a scalar of packed 4-bit floats has no safetensors form")
        shape = (*shape[:-1], shape[-1] * 2)
    return TensorSpec(name, code, shape)


class LiveTensor(TensorBytes):
    """A torch tensor, copied to the CPU and made contiguous only when it is read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def read(self) -> memoryview:
        return tensor_bytes(self._tensor)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Row-major bytes of a tensor on any device; no copy for a contiguous one on the CPU."""
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data.cast("B")
