"""Calling a live model such that nothing of it, and nothing around it, is changed: in eval mode, without gradients
and autocast, eagerly, with the states of all random generators put back. Models for which that cannot be had are
refused."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from registry.core.errors import ForwardFailed, InvalidInput, ModelChanged
from registry.core.reference import shown
from registry.formats.live import not_plain
from registry.formats.module_state import ModuleState
from registry.formats.probe_tree import plain_outputs, with_tensors
from registry.formats.tuner_layers import tuner_layers

MAX_BUFFER_BYTES = 256 << 20
"""Buffers of a model are copied, and put back, up to this; above it a change of one is an error, as for parameters."""
LIBRARIES = frozenset(("accelerate", "diffusers", "peft", "torch", "transformers"))
"""Whose hooks are part of how a model computes, such as torch's weight norm."""
_DISTRIBUTED = ("torch.distributed.", "torch.nn.parallel.")


def run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, seed: int = 0) -> Any:
    """What one call returns, as a plain tree on the CPU.

    Args:
        args: trees; their tensors are moved to the model's device.
        seed: of all random generators during the call.

    Raises:
        ForwardFailed: the model's code raised.
        ModelChanged: it wrote to a parameter.
    """
    device = device_of(model)
    with _kept(model), _quiet(device, seed):
        for one in model.modules():
            # Not through eval(), which some models override to merge weights or to keep layers frozen.
            one.training = False
        try:
            moved = with_tensors((args, dict(kwargs)), lambda tensor: tensor.to(device, copy=True))
            return plain_outputs(model(*moved[0], **moved[1]))
        except Exception as error:
            raise ForwardFailed(
                f"the forward of {type(model).__name__} raised {type(error).__name__}: {shown(str(error), 300)}"
            ) from error


def refuse_unrunnable(model: nn.Module) -> None:
    """
    Raises:
        InvalidInput: calling the model would need other processes, run hooks of the user, or miss its weights.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise InvalidInput("torch has global forward hooks, which would run with the model; remove them first")
    for path, one in model.named_modules():
        where = f"{type(one).__name__} {shown(path)}".rstrip()
        if isinstance(one, torch.jit.ScriptModule):
            raise InvalidInput(f"{where} is TorchScript, whose state cannot be put back after a call")
        if (type(one).__module__ + ".").startswith(_DISTRIBUTED):
            raise InvalidInput(f"{where} needs every process for its forward; give the model within")
        if _is_offloaded(one):
            raise InvalidInput(f"{where} is offloaded: its weights are not in place; load the model without that")
        hooks = (*one._forward_hooks.values(), *one._forward_pre_hooks.values())
        strange = next((hook for hook in hooks if _library(hook) not in LIBRARIES), None)
        if strange is not None:
            name = getattr(strange, "__qualname__", type(strange).__name__)
            raise InvalidInput(
                f"{where} has a forward hook ({shown(name)}), which would run with the model; remove it first"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        refused = not_plain(tensor)
        if refused is not None:
            raise InvalidInput(f"{shown(name)} is {refused[0]}; {refused[1]}")


def _library(hook: Any) -> str:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None)).partition(".")[0]


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate moves the module's weights in and out around its forward."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return any(getattr(one, "offload", False) or type(one).__name__ == "CpuOffload" for one in hooks)


# ---------------------------------------------------------------- what a model computes on


def device_of(model: nn.Module) -> torch.device:
    """Where its first parameter or buffer is; the CPU for a model without any."""
    first = next((tensor for tensor in (*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if first is None else first.device


def dtypes_of(model: nn.Module) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Of its floating-point parameters and buffers: the dtype of most elements, and the one of least precision."""
    counts: dict[torch.dtype, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    if not counts:
        return None, None
    return max(counts, key=lambda dtype: counts[dtype]), max(counts, key=lambda dtype: torch.finfo(dtype).eps)


# ---------------------------------------------------------------- leaving everything as it was


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Puts back attributes, flags and buffers.

    Raises:
        ModelChanged: a parameter was written to, which is noticed and cannot be put back.
    """
    buffers = list(model.buffers())
    if sum(buffer.nbytes for buffer in buffers) > MAX_BUFFER_BYTES:
        buffers = []
    copied = set(map(id, buffers))
    watched = [
        (name, tensor, tensor._version)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if id(tensor) not in copied and not tensor.is_inference()
    ]
    # PEFT's layers for bare parameters parametrise them during a call, for which torch sets each one to itself.
    set_again = {
        id(tensor): _checksum(tensor)
        for layer in tuner_layers(model)
        if hasattr(layer, "parameter_name")
        for tensor in cast(nn.Module, layer).parameters()  # PEFT's base class of layers is a mixin
    }
    before = ModuleState(model, values=buffers)
    try:
        yield
    finally:
        before.restore()
        changed = [
            name
            for name, tensor, version in watched
            if tensor._version != version and set_again.get(id(tensor)) != _checksum(tensor)
        ]
        if changed:
            raise ModelChanged(
                f"calling the {type(model).__name__} wrote to {shown(changed[0])} (and {len(changed) - 1} more), so it "
                "is not the model that it was: build it again, and push it with probe=False"
            )


def _checksum(tensor: torch.Tensor) -> int:
    """A number that is another one for almost every other content; of most use for a tensor too large to copy."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    return int(tensor.detach().contiguous().flatten().view(whole).sum(dtype=torch.int64))


@contextmanager
def _quiet(device: torch.device, seed: int) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_seeded(device, seed))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type} & {"cpu", "cuda"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if "torch._dynamo" in sys.modules:
            # A compiled model is not compiled again for inputs of another shape.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seeds the random generators that a model may draw from, and puts their states back."""
    numpy_random = sys.modules.get("numpy.random")
    plain = random.getstate()
    legacy = None if numpy_random is None else numpy_random.get_state()
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        # Not through torch.manual_seed, which seeds every device, also such as are not in use yet.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        if numpy_random is not None:
            numpy_random.seed(seed)
        yield
    finally:
        random.setstate(plain)
        if numpy_random is not None and legacy is not None:
            numpy_random.set_state(legacy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
