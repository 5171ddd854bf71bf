"""Adapters merged into one adapter: modules go through the method, and the result becomes PEFT tensors and a
configuration in which every module has the scaling 1."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from registry.core.adapter_config import AdapterConfig
from registry.core.adapter_names import canonical_name
from registry.core.errors import InvalidInput
from registry.core.reference import shown
from registry.formats.live import tensor_file
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_TENSORS
from registry.formats.source import PlainFileInMemory, Source
from registry.merge.adapter_form import PEFT_PREFIX, MadeModule, made_config, made_module, peft_tensors
from registry.merge.combine import Arithmetic, MergedUpdate, ModuleInputs, SourceUpdate, combine
from registry.merge.compress import RankChoice
from registry.merge.group import Options
from registry.merge.lora_modules import LoraModule, factors_of, update_shape
from registry.merge.low_rank import LowRank
from registry.merge.methods import find_method
from registry.operations.merging.copies import copied_tensor
from registry.operations.merging.plan import MergePlan
from registry.operations.merging.report import ModuleReport
from registry.operations.merging.request import check_device
from registry.operations.merging.sources import SourceTensors
from registry.store.interface import BlobStore

if TYPE_CHECKING:
    from torch import Tensor

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def merge_adapters(blobs: BlobStore, plan: MergePlan, note: Callable[[str], None]) -> tuple[Source, list[ModuleReport]]:
    """Computes the merged adapter.

    Raises:
        InvalidInput: a method that refuses, NaN in a source, a rank above all dimensions.
        DigestMismatch, BlobNotFound, Corrupt: the store is damaged.
    """
    check_device(plan.request.device)
    with ExitStack() as stack:
        tensors = stack.enter_context(SourceTensors(blobs))
        read = [
            tensors.read(source.component, {name for module in source.modules.values() for name in module.tensors})
            for source in plan.sources
        ]
        modules = plan.modules()
        inputs = module_inputs(plan, modules, read)
        _check_rank(plan, inputs)
        merged = {
            one.path: one
            for one in combine(
                inputs,
                find_method(plan.request.method),
                Options(**plan.request.options),
                RankChoice(plan.request.rank, plan.request.energy),
                arithmetic=arithmetic_of(plan),
                note=note,
            )
        }
        made = [
            _made(plan, having, merged[path], merged_bias(plan, path, having, read)) for path, having in modules.items()
        ]
        document = _config(plan, made)
        dtype = TORCH_DTYPES[plan.request.dtype or "F32"]
        found = peft_tensors(made, dtype)
        _refuse_overflow(found, dtype)
        for copied in plan.copies.tensors:
            found[PEFT_PREFIX + copied.name] = copied_tensor(copied, plan.sources, tensors).clone()
    reports = [
        ModuleReport(
            path, len(modules[path]), merged[path].of_ranks, merged[path].rank, merged[path].norm, merged[path].error
        )
        for path in sorted(modules)
    ]
    return adapter_source(document, found, plan.recipe, _peft_version(plan)), reports


def adapter_source(
    config: AdapterConfig, tensors: Mapping[str, Tensor], recipe: Mapping[str, Any], peft_version: str | None
) -> Source:
    """A made adapter as something that can be pushed."""
    text = json.dumps(config.document, indent=2, sort_keys=True).encode("utf-8")
    return Source(
        form="merged adapter",
        kind="adapter",
        tensor_files=(tensor_file(ADAPTER_TENSORS, "adapter", tensors),),
        plain_files=(PlainFileInMemory(ADAPTER_CONFIG, text),),
        config=config,
        peft_version=peft_version,
        recipe=recipe,
    )


def module_inputs(
    plan: MergePlan, modules: Mapping[str, Sequence[tuple[int, LoraModule]]], read: Sequence[Mapping[str, Tensor]]
) -> list[ModuleInputs]:
    """What each module brings to the method.

    Args:
        read: the tensors of each source, by name.
    """
    return [one_module(plan, path, having, [read[number] for number, _ in having]) for path, having in modules.items()]


def one_module(
    plan: MergePlan, path: str, having: Sequence[tuple[int, LoraModule]], tensors: Sequence[Mapping[str, Tensor]]
) -> ModuleInputs:
    """What one module brings.

    Args:
        tensors: of those sources that have it.
    """
    weights = method_weights(plan, path)
    updates = []
    shape = (0, 0, 0)
    for (number, module), read in zip(having, tensors, strict=True):
        blocks, rows, columns, rank = update_shape(module, plan.sources[number].side.layout)
        shape = (blocks, rows, columns)
        updates.append(SourceUpdate(number, rank, module.scaling or 0.0, weights[number], _reader(module, read)))
    return ModuleInputs(path, shape, tuple(updates))


def method_weights(plan: MergePlan, path: str) -> tuple[float, ...]:
    """The weights that a method gets for one module: as given; of slerp, which knows but a place on an arc, made to add
    up to 1.

    Raises:
        InvalidInput: not two sources, or negative weights, for slerp.
    """
    weights = plan.request.weights_of(path, plan.weights)
    if plan.request.method != "slerp":
        return weights
    if len(weights) != 2:
        raise InvalidInput(f"slerp takes exactly two sources, found {len(weights)}; ties, knots and tsv take more")
    most = max(weights)
    if min(weights) < 0 or most <= 0:
        raise InvalidInput(
            f"slerp takes weights of at least 0 that are not both 0, found {weights[0]:g}, {weights[1]:g}"
        )
    total = sum(one / most for one in weights)
    return tuple(one / most / total for one in weights)


def _reader(module: LoraModule, tensors: Mapping[str, Tensor]) -> Callable[[], LowRank]:
    return lambda: factors_of(module, tensors)


def arithmetic_of(plan: MergePlan) -> Arithmetic:
    """Precision and device that were asked for."""
    wide = plan.request.precise or plan.request.dtype == "F64"
    return Arithmetic(torch.float64 if wide else torch.float32, plan.request.device)


def merged_bias(
    plan: MergePlan, path: str, having: list[tuple[int, LoraModule]], read: list[dict[str, Tensor]]
) -> Tensor | None:
    """The weighted sum of the biases of B (`lora_bias`), whatever the method; None where no source has one."""
    weights = method_weights(plan, path)
    total: Tensor | None = None
    for number, module in having:
        name = next((one for one in module.tensors if canonical_name(one).endswith(".lora_B.bias")), None)
        if name is None:
            continue
        term = read[number][name].double() * (weights[number] * (module.scaling or 0.0))
        total = term if total is None else total + term
    return total


def _made(
    plan: MergePlan, having: list[tuple[int, LoraModule]], merged: MergedUpdate, bias: Tensor | None
) -> MadeModule:
    if merged.factors is None:
        raise AssertionError("a method's dense update was not cut")
    number, module = having[0]
    factors = LowRank(merged.factors.a.cpu(), merged.factors.b.cpu())
    return made_module(module, plan.sources[number].side.layout, factors, bias)


def _check_rank(plan: MergePlan, inputs: list[ModuleInputs]) -> None:
    """
    Raises:
        InvalidInput: a rank that no module has the dimensions for.
    """
    if plan.request.rank is None:
        return
    widest = max(inputs, key=lambda one: min(one.shape[1:]))
    most = min(widest.shape[1:])
    if plan.request.rank > most:
        raise InvalidInput(
            f"rank {plan.request.rank} is above the dimensions of every module: {shown(widest.path, 200)}, the "
            "largest, "
            f"has {widest.shape[1]} x {widest.shape[2]}; give {most} or less"
        )


def _config(plan: MergePlan, made: list[MadeModule]) -> AdapterConfig:
    configs = [source.side.config for source in plan.sources if source.side.config is not None]
    extra: dict[str, Any] = {"modules_to_save": None, "trainable_token_indices": None}
    if plan.copies.tensors:
        taken = [config for place in plan.copies.sources if (config := plan.sources[place].side.config) is not None]
        saved = sorted({name for config in taken for name in config.modules_to_save})
        extra["modules_to_save"] = saved or None
        tokens = next((known for one in taken if (known := one.document.get("trainable_token_indices"))), None)
        if tokens:
            extra["trainable_token_indices"] = tokens
    names = {config.base_model for config in configs}
    base_model = next(iter(names)) if len(names) == 1 else None
    paths = None if plan.base is None or not plan.base.side.form.exact else tuple(plan.base.side.form.paths)
    return made_config(made, like=configs, all_paths=paths, base_model=base_model, extra=extra)


def _peft_version(plan: MergePlan) -> str | None:
    """The order of experts' factors is that of the PEFT that wrote them."""
    versions = {source.side.written_by for source in plan.sources}
    return next(iter(versions)) if len(versions) == 1 else None


def _refuse_overflow(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(
                f"{shown(name, 200)} has values beyond {str(dtype).removeprefix('torch.')}; ask for another dtype, or "
                "for smaller weights"
            )
