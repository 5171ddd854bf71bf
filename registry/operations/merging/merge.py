"""Merging stored adapters into a new version: of an adapter, or of a base. The plan is made in one snapshot; a recipe
that was computed before is found; else it is computed, and pushed like anything else."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from registry.catalog.contents import read_contents
from registry.catalog.descriptions import descriptions_of
from registry.catalog.versions import records
from registry.core.errors import BlobNotFound, Corrupt
from registry.core.reference import parse_push_target
from registry.formats.paths import ADAPTER_CONFIG
from registry.formats.source import PlainFileInMemory, Source
from registry.merge.methods import find_method
from registry.operations.annotate import annotate
from registry.operations.context import Context
from registry.operations.inspect import get
from registry.operations.merging.plan import MergePlan, plan_merge
from registry.operations.merging.recipe import find_made
from registry.operations.merging.report import MergeResult, ModuleReport, relative_error
from registry.operations.merging.request import MergeRequest
from registry.operations.push import PushResult, push
from registry.operations.push_request import Request, check_request

METRIC = "merge_relative_error"
METHOD = "merge_method"


def merge(
    context: Context,
    name: str,
    request: MergeRequest,
    *,
    sources: Sequence[str] = (),
    where: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    base: str | None = None,
    into_base: bool = False,
    tags: Sequence[str] = (),
    metadata: Mapping[str, object] | None = None,
    message: str | None = None,
) -> MergeResult:
    """Merges adapters; see `Registry.merge`."""
    context.require_writable()
    namespace, bare, _ = parse_push_target(name)
    begin = time.perf_counter()
    with context.reading() as connection:
        plan = plan_merge(
            context,
            connection,
            request,
            given=sources,
            where=where,
            weights=weights,
            base=base,
            into_base=into_base,
            output=(namespace, bare),
        )
        made = find_made(connection, context.store.blobs, plan.parent_ids, plan.recipe, "merged_from")

    def asked(metrics: Mapping[str, float]) -> Request:
        return check_request(
            name,
            base=plan.base.reference if plan.base is not None and not into_base else None,
            tags=tags,
            metadata={METHOD: request.method, **(metadata or {})},
            metrics=metrics,
            kind="base" if into_base else "adapter",
            message=message,
            parents=plan.parents,
            force=request.force,
        )

    asked({})  # what is wrong with a tag or a value is said before anything is computed
    notes = list(plan.notes)
    if made is not None:
        try:
            with stored_source(context, made[0], plan.recipe) as source:
                known = get(context, made[1]).metrics.get(METRIC)
                pushed = push(context, source, asked({} if known is None else {METRIC: known.number}))
        except (BlobNotFound, Corrupt) as error:
            notes.append(f"{made[1]} has this recipe, and is damaged, so it was computed again: {str(error)[:200]}")
        else:
            return _result(plan, pushed, made[1], (), notes, time.perf_counter() - begin)
    source, reports = compute(context, plan, notes)
    if not into_base:
        computed = time.perf_counter() - begin
        with source:
            pushed = push(context, source, asked({METRIC: relative_error(reports)}))
    else:
        with source:
            pushed = push(context, source, asked({}))
        computed = time.perf_counter() - begin  # the tensors are made while they are pushed
        if pushed.created:
            annotate(context, pushed.reference, metadata={}, metrics={METRIC: relative_error(reports)}, step=None)
    reports = sorted(reports, key=lambda one: one.path)
    return _result(plan, pushed, None, tuple(reports), notes, computed)


def compute(context: Context, plan: MergePlan, notes: list[str]) -> tuple[Source, list[ModuleReport]]:
    """The result of a plan as a source; of a merge into a base the reports are complete once it was read."""

    def note(text: str) -> None:
        if text not in notes:
            notes.append(text)

    if not plan.into_base:
        from registry.operations.merging.adapters import merge_adapters

        return merge_adapters(context.store.blobs, plan, note)
    from registry.operations.merging.into_base import merge_into_base

    if plan.base is None:
        raise AssertionError("a merge into a base has one")
    with context.reading() as connection:
        contents = read_contents(connection, plan.base.id)
        described = descriptions_of(connection, plan.base.id)
    return merge_into_base(context, plan, contents, described, note)


def stored_source(context: Context, version_id: int, recipe: Mapping[str, Any]) -> Source:
    """A version that a recipe made, to be pushed again: the very files, so that the manifest is the same."""
    from contextlib import ExitStack

    from registry.formats.source import MadeFile, Stored
    from registry.operations.load import config_of
    from registry.operations.reading import BlobReader, blob_bytes

    with context.reading() as connection:
        contents = read_contents(connection, version_id)
        described = descriptions_of(connection, version_id)
        record = records(connection, [version_id])[0]
    blobs = context.store.blobs
    resources = ExitStack()
    reader = resources.enter_context(BlobReader(blobs))
    role = "adapter" if record.kind == "adapter" else "model"
    component = contents.components[role]
    carried = next(file for file in contents.files if file.role == role)
    stored = {
        ordinal: Stored(digest, blob, place, blobs.size(blob))
        for ordinal, (digest, (blob, place)) in enumerate(zip(component.tensors, component.places, strict=True))
    }

    def read(ordinal: int) -> Any:
        return (memoryview(chunk) for chunk in reader.tensor(*component.places[ordinal]))

    plain = [
        PlainFileInMemory(file.path, blob_bytes(blobs, file.blob))
        for file in contents.files
        if file.role is None and file.whole
    ]
    return Source(
        form=f"version {record.reference}",
        kind=record.kind,
        tensor_files=(
            MadeFile(carried.path, role, component.layout, stored=stored, read=read, metadata={"format": "pt"}),
        ),
        plain_files=tuple(plain),
        config=config_of(blobs, reader, contents) if any(one.path == ADAPTER_CONFIG for one in plain) else None,
        peft_version=record.peft_version,
        described={
            one: blob_bytes(blobs, digest)
            for one, digest in described.items()
            if one in ("live_names", "modules", "architecture", "rounded_digests")
        },
        recipe=recipe,
        digest=record.digest,
        resources=resources,
    )


def _result(
    plan: MergePlan,
    pushed: PushResult,
    found: str | None,
    reports: tuple[ModuleReport, ...],
    notes: Sequence[str],
    seconds: float,
) -> MergeResult:
    return MergeResult(
        reference=pushed.reference,
        created=pushed.created,
        found=found,
        method=plan.request.method,
        sources=tuple((one.reference, weight) for one, weight in zip(plan.sources, plan.weights, strict=True)),
        base=None if plan.base is None else plan.base.reference,
        into_base=plan.into_base,
        cross_terms=find_method(plan.request.method).factor_wise,
        modules=reports,
        findings=plan.findings,
        notes=tuple(dict.fromkeys((*notes, *pushed.notes))),
        seconds=seconds,
    )
