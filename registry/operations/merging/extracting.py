"""An adapter out of a fine-tuned checkpoint: what differs from the base is found by digests, read pair by pair, cut to
low rank, and pushed as an adapter of that base. What no adapter can hold is reported, never dropped in silence."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from registry.core.errors import InvalidInput
from registry.core.model_form import ModelForm
from registry.core.reference import parse_push_target, shown
from registry.formats.live import tensor_file
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_TENSORS
from registry.formats.source import PlainFileInMemory, Source
from registry.merge.adapter_form import MadeModule, made_config, peft_tensors
from registry.merge.compress import RankChoice
from registry.merge.extraction import difference, extract_module
from registry.operations.context import Context
from registry.operations.diff_weights import tensor_norms
from registry.operations.merging.adapters import TORCH_DTYPES
from registry.operations.merging.changes import Compared, Left, Wanted, compare, form_of, refuse_unknown, two_models
from registry.operations.merging.extracted import (
    ExtractRequest,
    ExtractResult,
    LeftOut,
    ModuleExtract,
    relative_error_of,
)
from registry.operations.merging.merge import stored_source
from registry.operations.merging.recipe import find_made
from registry.operations.merging.sources import SourceTensors
from registry.operations.push import PushResult, push
from registry.operations.push_request import Request, check_request

METRIC = "extract_relative_error"
RELATION = "extracted_from"


def extract(
    context: Context,
    checkpoint: str,
    name: str,
    request: ExtractRequest,
    *,
    base: str | None = None,
    tags: Sequence[str] = (),
    metadata: Mapping[str, object] | None = None,
    message: str | None = None,
) -> ExtractResult:
    """Extracts an adapter; see `Registry.extract`."""
    context.require_writable()
    parse_push_target(name)
    begin = time.perf_counter()
    with context.reading() as connection:
        of_base, tuned = two_models(context, connection, base, checkpoint)
        recipe = request.recipe(of_base.record.digest, tuned.record.digest)
        made = find_made(connection, context.store.blobs, [tuned.record.id], recipe, RELATION)

    def asked(metrics: Mapping[str, float]) -> Request:
        return check_request(
            name,
            base=of_base.reference,
            tags=tags,
            metadata=metadata,
            metrics=metrics,
            kind="adapter",
            message=message,
            parents=[(RELATION, tuned.reference, None)],
            force=request.force,
        )

    asked({})  # what is wrong with a tag or a value is said before anything is computed
    if made is not None:
        with stored_source(context, made[0], recipe) as source:
            pushed = push(context, source, asked({}))
        return _result(pushed, of_base, tuned, made[1], (), (), (), time.perf_counter() - begin)
    notes: list[str] = []
    form = form_of(of_base, tuned, notes)
    refuse_unknown(request, form, of_base.reference)
    wanted, left = compare(of_base, tuned, form, request, notes)
    _check_rank(request, wanted)
    with SourceTensors(context.store.blobs) as tensors:
        modules, reports = _computed(tensors, of_base, tuned, wanted, request, notes)
        found = [LeftOut(one.tensor, one.why, _norm(tensors, of_base, tuned, one)) for one in left]
    left_out = sorted(found, key=lambda one: (-(one.norm or 0.0), one.name))
    if not modules:
        raise InvalidInput(_nothing(of_base, tuned, left_out))
    seconds = time.perf_counter() - begin
    with _source(modules, form, request, recipe) as source:
        pushed = push(context, source, asked({METRIC: relative_error_of(reports, left_out)}))
    return _result(pushed, of_base, tuned, None, reports, left_out, notes, seconds)


def _result(
    pushed: PushResult,
    base: Compared,
    tuned: Compared,
    found: str | None,
    modules: Sequence[ModuleExtract],
    left_out: Sequence[LeftOut],
    notes: Sequence[str],
    seconds: float,
) -> ExtractResult:
    return ExtractResult(
        reference=pushed.reference,
        created=pushed.created,
        found=found,
        checkpoint=tuned.reference,
        base=base.reference,
        modules=tuple(modules),
        left_out=tuple(left_out),
        findings=pushed.findings,
        notes=(*notes, *pushed.notes),
        seconds=seconds,
    )


def _check_rank(request: ExtractRequest, wanted: Sequence[Wanted]) -> None:
    """
    Raises:
        InvalidInput: a rank that no module has the dimensions for.
    """
    if request.rank is None or not wanted:
        return
    widest = max(wanted, key=lambda one: min(one.shape.rows, one.shape.columns))
    most = min(widest.shape.rows, widest.shape.columns)
    if request.rank > most:
        raise InvalidInput(
            f"rank {request.rank} is above the dimensions of every module that differs: {shown(widest.path, 200)}, the "
            f"largest, has {widest.shape.rows} x {widest.shape.columns}; give {most} or less"
        )


def _nothing(base: Compared, tuned: Compared, left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return f"{tuned.reference} differs from {base.reference} in no tensor, so there is nothing to extract"
    first = left_out[0]
    return (
        f"{tuned.reference} differs from {base.reference} in nothing that an adapter can hold: {len(left_out)} tensors "
        f"were left out, {shown(first.name, 200)} first ({first.why})"
    )


# ---------------------------------------------------------------- tensors


def _pair(tensors: SourceTensors, base: Compared, tuned: Compared, name: str) -> tuple[Tensor, Tensor]:
    """Both tensors of a live name, mapped and proven."""
    ours, theirs = (tensors.read(one.component, {one.saved[name]})[one.saved[name]] for one in (base, tuned))
    return ours, theirs


def _computed(
    tensors: SourceTensors,
    base: Compared,
    tuned: Compared,
    wanted: Sequence[Wanted],
    request: ExtractRequest,
    notes: list[str],
) -> tuple[list[MadeModule], list[ModuleExtract]]:
    """One module at a time, so that one difference is in memory."""
    modules, reports = [], []
    choice = RankChoice(request.rank, request.energy)
    wide = torch.float64 if request.precise else torch.float32
    equal = 0
    for one in wanted:
        delta = difference(*_pair(tensors, base, tuned, one.tensor), dtype=wide, device=request.device, name=one.tensor)
        if not bool(delta.any()):
            equal += 1
            continue
        times = (request.attention_out or 1) if one.shape.kind == "attention_out" else 1
        made = extract_module(one.path, one.shape, delta, choice, dtype=TORCH_DTYPES[request.dtype], times=times)
        modules.append(made.module)
        reports.append(ModuleExtract(one.path, one.shape.kind, made.rank, made.norm, made.error))
    if equal:
        notes.append(f"{equal} weights have other bytes and the same values, and count as equal")
    return modules, reports


def _norm(tensors: SourceTensors, base: Compared, tuned: Compared, left: Left) -> float | None:
    if not left.readable:
        return None
    found = tensor_norms(*_pair(tensors, base, tuned, left.tensor)).distance
    return found if math.isfinite(found) else None


def _source(
    modules: Sequence[MadeModule], form: ModelForm, request: ExtractRequest, recipe: Mapping[str, Any]
) -> Source:
    turned = [form.by_path[one.path].kind == "transformers_conv1d" for one in modules if one.kind == "linear"]
    config = made_config(
        modules, all_paths=form.paths, extra={"fan_in_fan_out": True} if turned and all(turned) else None
    )
    text = json.dumps(config.document, indent=2, sort_keys=True).encode("utf-8")
    return Source(
        form="extracted adapter",
        kind="adapter",
        tensor_files=(tensor_file(ADAPTER_TENSORS, "adapter", peft_tensors(modules, TORCH_DTYPES[request.dtype])),),
        plain_files=(PlainFileInMemory(ADAPTER_CONFIG, text),),
        config=config,
        recipe=recipe,
    )
