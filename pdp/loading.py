"""Putting a checkpoint's tensors into a live model: matched under the names of the bare network, checked as a whole,
then copied. Lenient loads say in the guide's words what they let pass; a load of which nothing would land is always
refused."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pdp.building import build_network
from pdp.checkpoints import Checkpoint, RegistryCheckpoint, read_checkpoint
from pdp.errors import CheckpointError, CheckpointWarning, user_level
from pdp.state_names import by_network_name
from registry.core.errors import Incompatible
from registry.core.findings import Finding
from registry.core.tensor_names import is_adapter_tensor
from registry.operations.copying import copy_into, differences

MASK = "mask"
"""The buffer of `causal_attn`: a function of its size. Older files hold it as numbers that are added."""


def say(message: str) -> None:
    """Warns whoever called pdp."""
    warnings.warn(message, CheckpointWarning, stacklevel=user_level())


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers under the names of the bare network."""
    return by_network_name(model.state_dict(), type(model).__name__)


def fit(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    strict: bool,
    what: str,
    only_adapter: bool = False,
    refused: Sequence[Finding] = (),
    mismatch: Sequence[str] = (),
    quiet: bool = False,
) -> Callable[[], None]:
    """Looks whether tensors fit a model, and warns of what a lenient load lets pass.

    Args:
        tensors: under the names of the bare network; from the CPU, whatever device the model is on.
        strict: refuse names that are missing or too many; else warn of them and load the rest. A shape that differs in
            more than the rank of an adapter is refused in any case.
        what: names the checkpoint in messages.
        only_adapter: the tensors belong into the adapter of the model, and nothing of its base is changed or missed.
        refused: what the caller found already.
        mismatch: in which LoRA settings checkpoint and model differ, to be warned of.
        quiet: do not warn; the same was said before.

    Returns:
        A function that copies them; until it is called, the model is unchanged.

    Raises:
        Incompatible: with all differences.
    """
    own = live_tensors(model)
    targets = {name: one for name, one in own.items() if is_adapter_tensor(name)} if only_adapter else own
    given = _with_mask_of(targets, tensors)
    found = [*refused, *differences(targets, given)]
    misfit = f"{what} does not fit this {type(model).__name__}"
    lenient = {finding.subject for finding in found if _lets_pass(finding, targets, given)}
    errors = [one for one in found if one.severity == "error" and (strict or one.subject not in lenient)]
    if errors:
        raise Incompatible(f"{misfit}; nothing was changed", errors)
    fitting = {name: tensor for name, tensor in given.items() if name in targets and name not in lenient}
    if not fitting:
        raise Incompatible(f"{misfit}: none of its {len(given)} tensors does; nothing was changed", found)
    if mismatch and not quiet:
        say(f"LoRA configuration mismatch! {what} and this model differ in {'; '.join(mismatch)}")
    if not quiet:
        _say_differences(found)
    places = {name: targets[name] for name in fitting}
    return lambda: copy_into(model, places, fitting, strict=True, what=what)


def fit_average(averaged: nn.Module, checkpoint: Checkpoint, *, strict: bool) -> Callable[[], None]:
    """The same for a moving average, which begins with the weights where the checkpoint has none. It warns of nothing
    that the weights were not warned of.

    Raises:
        Incompatible: it does not fit.
    """
    if "ema" in checkpoint.roles:
        return fit(averaged, checkpoint.averaged, strict=strict, what=checkpoint.what, quiet=True)
    say(f"{checkpoint.what} holds no moving average; it begins with the weights")
    only_adapter = "model" not in checkpoint.roles
    return fit(averaged, checkpoint.network, strict=strict, what=checkpoint.what, only_adapter=only_adapter, quiet=True)


def _lets_pass(finding: Finding, targets: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    if finding.code in ("C05", "C06"):
        return True
    name = finding.subject
    if finding.code != "C08" or not is_adapter_tensor(name) or name not in given or name not in targets:
        return False
    # (r, in) or (out, r): the size that is no rank has to agree.
    rank = 0 if name.endswith("lora_A.weight") else 1
    here, there = targets[name].shape, given[name].shape
    return len(here) == len(there) == 2 and here[1 - rank] == there[1 - rank]


def _say_differences(found: Iterable[Finding]) -> None:
    missing = sorted(one.subject for one in found if one.code == "C06")
    unexpected = sorted(one.subject for one in found if one.code == "C05")
    shapes = [one for one in found if one.code == "C08"]
    if missing:
        say(f"Missing keys: {missing}")
    if unexpected:
        say(f"Unexpected keys: {unexpected}")
    if shapes:
        first = shapes[0]
        say(
            f"Keys of another rank, left as they were: {sorted(one.subject for one in shapes)} (the first: expected "
            f"{first.expected}, found {first.found})"
        )


def _with_mask_of(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with the model's own mask in the place of an equal one of another kind."""
    found = dict(tensors)
    mine, others = targets.get(MASK), found.get(MASK)
    if mine is not None and others is not None and mine.shape == others.shape and mine.dtype != others.dtype:
        seen = others == 0 if others.is_floating_point() else others.bool()
        if torch.equal(seen, mine.bool().cpu()):
            found[MASK] = mine.detach().cpu()
    return found


_COMPARED_BY_FIT = frozenset({"C05", "C06", "C08", "C09", "C10", "C12", "C13", "C23", "C24", "C29"})
"""What is compared here, tensor by tensor and argument by argument; and a LoRA takes the place of its own."""


def checked_first(checkpoint: Checkpoint, model: nn.Module, *, strict: bool) -> list[Finding]:
    """Holds an adapter of a registry against a model by the rules of `registry check`, its weights included.

    Args:
        strict: False: warn of what speaks against it.

    Returns:
        What to refuse it for.
    """
    if not isinstance(checkpoint, RegistryCheckpoint) or checkpoint.kind != "adapter":
        return []
    found = checkpoint.registry.check(checkpoint.reference, model, prove=False)
    errors = [one for one in found.errors if one.code not in _COMPARED_BY_FIT]
    if strict:
        return errors
    for error in errors:
        say(f"{checkpoint.what}: {error}")
    return []


def refused_arguments(differing: Iterable[str]) -> list[Finding]:
    """Constructor arguments that differ, as findings: no shape may show them, so nothing lenient lets them pass."""
    return [
        Finding("C08", "error", text.partition(":")[0], text.partition(": ")[2], mend="build the model as it was")
        for text in differing
    ]


def load_network(
    path: str | os.PathLike[str] | Checkpoint,
    *,
    classes: Iterable[type[nn.Module]] = (),
    use_ema: bool = False,
    registry: Any = None,
) -> nn.Module:
    """A plain network, made and filled from a file or a version that has no LoRA in it: a base, a merged model, a
    workspace's checkpoint.

    Args:
        classes: classes of networks beside pdp's own that the checkpoint may name.
        use_ema: take the moving average of the weights.

    Returns:
        The network in eval mode, on the CPU.

    Raises:
        CheckpointError: it holds a LoRA, or it is of a class that is not in the table.
        InvalidInput: a torn file, or one that would run code; NotFound, Incompatible
    """
    checkpoint = read_checkpoint(path, registry)
    if checkpoint.adapter:
        raise CheckpointError(
            f"{checkpoint.what} holds a LoRA; load it with LoraTransformerForDiffusion.from_checkpoint"
        )
    network = build_network(checkpoint, checkpoint.base, classes)
    fit(network, checkpoint.averaged if use_ema else checkpoint.network, strict=True, what=checkpoint.what)()
    return network.eval()
