"""A merge before a weight is read: sources in the order of computation, the base, what the compatibility rules say,
lineage and recipe. All of it comes from one snapshot of the catalog."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from sqlalchemy import Connection

from registry.catalog.lineage import references, walk
from registry.catalog.merging import joined_targets
from registry.catalog.versions import records, resolve
from registry.compat.case import Case, ModelSide
from registry.compat.compatibility import in_order
from registry.compat.placing import Placing
from registry.compat.rules import check_case
from registry.core.errors import Incompatible, InvalidInput, ShapeMismatch
from registry.core.findings import Finding
from registry.core.reference import parse_reference, shown
from registry.merge.lora_modules import LoraModule, update_shape
from registry.operations.checking import peft_to_ask
from registry.operations.context import Context
from registry.operations.merging.copies import Copies, decide_copies
from registry.operations.merging.recipe import merge_recipe
from registry.operations.merging.request import MergeRequest, check_weights
from registry.operations.merging.sources import MergeSource, find_sources, read_sources
from registry.operations.sides import Sides

OF_THE_BASES_WEIGHTS = frozenset({"C16", "C19", "C21", "C25"})
"""Rules about the weights that a merge would change: no matter where the result is an adapter."""
SUMS = ("cat", "svd")
"""Methods whose result in a base is the plain weighted sum."""
_CONTAINING = frozenset({"merged_from", "converted_from", "continued_from", "trained_on"})


@dataclass(frozen=True)
class Base:
    """The base of a merge.

    Attributes:
        id: its row id.
    """

    id: int
    reference: str
    digest: str
    side: ModelSide


@dataclass(frozen=True)
class MergePlan:
    """All that is known of a merge before weights are read.

    Attributes:
        sources: by manifest digest, so that the order in which they are given does not matter.
        weights: of each source.
        base: that the result is of, or goes into.
        placings: where the targets of each source are in the base; empty without one.
        parents: lineage of the result, (relation, reference, weight).
    """

    request: MergeRequest
    into_base: bool
    sources: tuple[MergeSource, ...]
    weights: tuple[float, ...]
    base: Base | None
    placings: tuple[Placing, ...]
    copies: Copies
    recipe: dict[str, Any]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def parents(self) -> tuple[tuple[str, str, float | None], ...]:
        found: list[tuple[str, str, float | None]] = [
            ("merged_from", source.reference, weight) for source, weight in zip(self.sources, self.weights, strict=True)
        ]
        if self.into_base and self.base is not None:
            found.append(("merged_from", self.base.reference, 1.0))
        return tuple(found)

    @property
    def parent_ids(self) -> list[int]:
        into = [self.base.id] if self.into_base and self.base is not None else []
        return [*(source.record.id for source in self.sources), *into]

    def modules(self) -> dict[str, list[tuple[int, LoraModule]]]:
        """Module path -> the sources that change it, with their factors."""
        found: dict[str, list[tuple[int, LoraModule]]] = {}
        for number, source in enumerate(self.sources):
            for path, module in source.modules.items():
                found.setdefault(path, []).append((number, module))
        return found


def plan_merge(
    context: Context,
    connection: Connection,
    request: MergeRequest,
    *,
    given: Sequence[str],
    where: Sequence[str],
    weights: Sequence[float] | None,
    base: str | None,
    into_base: bool,
    output: tuple[str, str] | None = None,
) -> MergePlan:
    """Puts a merge together.

    Raises:
        InvalidInput: no source, one twice, weights that do not match, a base that contains a source.
        Incompatible: a source cannot be merged, or was trained on other weights than the base's.
        ShapeMismatch: two sources disagree about the sizes of a module.
        NotFound, NotStored
    """
    early: list[str] = []
    ids = find_sources(connection, given, where, output=output, note=early.append)
    numbers = check_weights(weights, len(ids))
    for pattern, some in request.module_weights:
        if len(some) != len(ids):
            what = f"{len(some)} weights for the modules {shown(pattern, 200)}"
            raise InvalidInput(f"{what} and {len(ids)} sources; give one for each, in their order")
    read = read_sources(context, connection, ids)
    _refuse_twice(read)
    order = sorted(range(len(read)), key=lambda place: read[place].record.digest)
    sources = tuple(read[place] for place in order)
    ordered = tuple(numbers[place] for place in order)
    request = replace(
        request,
        module_weights=tuple((one, tuple(some[place] for place in order)) for one, some in request.module_weights),
        saved=_saved_source(connection, request.saved, sources),
    )
    chosen = _base(context, connection, sources, base, into_base=into_base)
    if into_base and chosen is not None and not request.force:
        _refuse_contained(connection, chosen, sources)
    findings, notes, placings = _check(sources, chosen, request, into_base=into_base)
    _check_sizes(connection, sources)
    _refuse_idle_patterns(request, sources)
    copies = decide_copies(
        sources,
        lambda name: request.weights_of(name.rpartition(".")[0], ordered),
        request.saved,
        into_base=into_base,
    )
    if not copies.tensors and not copies.dropped:
        request = replace(request, saved=None)  # it decides nothing, so it is no part of the recipe
    if not into_base or not any(_attention_out(source) for source in sources):
        request = replace(request, attention_out=None)
    if copies.dropped:
        notes.append(f"left out, as asked: {', '.join(shown(one, 120) for one in copies.dropped[:5])}")
    dtype = None if into_base else request.dtype or _widest(sources)
    request = replace(request, dtype=dtype)
    recipe = merge_recipe(
        request,
        [one.record.digest for one in sources],
        ordered,
        base=None if chosen is None else chosen.digest,
        into_base=into_base,
        dtype=dtype,
    )
    return MergePlan(
        request, into_base, sources, ordered, chosen, placings, copies, recipe, in_order(findings), (*early, *notes)
    )


def _refuse_twice(sources: Sequence[MergeSource]) -> None:
    """
    Raises:
        InvalidInput: two of them are one adapter, under two names or in two forms.
    """
    known: dict[str, str] = {}
    for source in sources:
        other = known.setdefault(source.record.content_digest, source.reference)
        if other != source.reference:
            raise InvalidInput(
                f"{source.reference} and {other} are the same adapter; give it once, with the sum of its weights"
            )


def _refuse_idle_patterns(request: MergeRequest, sources: Sequence[MergeSource]) -> None:
    """
    Raises:
        InvalidInput: a pattern of module weights that matches no module.
    """
    paths = {path for source in sources for path in source.modules}
    for pattern, _ in request.module_weights:
        if not fnmatch.filter(paths, pattern):
            near = get_close_matches(pattern, paths, 1, 0.3)
            hint = f"; {shown(near[0], 200)} is one" if near else ""
            raise InvalidInput(f"the module weights for {shown(pattern, 200)} match no module of the sources{hint}")


def _saved_source(connection: Connection, saved: str | None, sources: Sequence[MergeSource]) -> str | None:
    """The policy for whole copies, a source by its manifest digest."""
    known = {source.record.digest for source in sources}
    if saved is None or saved in ("drop", "mean") or saved in known:
        return saved
    digest = resolve(connection, parse_reference(saved)).digest
    if digest not in known:
        raise InvalidInput(f"saved: {shown(saved, 200)} is none of the sources; give drop, mean, or one of them")
    return digest


def _base(
    context: Context, connection: Connection, sources: Sequence[MergeSource], given: str | None, *, into_base: bool
) -> Base | None:
    """The base that was given, else that of the sources."""
    if given is not None:
        identifier: int | None = resolve(connection, parse_reference(given)).id
    else:
        known = [source.base_id for source in sources if source.base_id is not None]
        identifier = known[0] if known else None
    if identifier is None:
        if into_base:
            raise InvalidInput("none of the sources says its base; give the one to merge into with --base")
        return None
    record = records(connection, [identifier])[0]
    if record.kind == "adapter":
        raise InvalidInput(f"{record.reference} is an adapter; give the base that the sources were trained on")
    side = Sides(context, connection).model(identifier)
    return Base(identifier, record.reference, record.digest, side)


def _check(
    sources: Sequence[MergeSource], base: Base | None, request: MergeRequest, *, into_base: bool
) -> tuple[list[Finding], list[str], tuple[Placing, ...]]:
    """What the rules of `check --for merge` say of each source.

    Raises:
        Incompatible: an error, without force.
    """
    findings: list[Finding] = []
    notes: list[str] = []
    placings = []
    for source in sources:
        case = Case(source.side, None if base is None else base.side, peft_to_ask(None), "merge")
        placings.append(case.placing)
        found = [
            one for one in check_case(case).findings if into_base or one.code not in OF_THE_BASES_WEIGHTS
        ]  # fmt: skip
        errors = [one for one in found if one.severity == "error"]
        # Factors that are not finite, or no factors at all, cannot be forced.
        fatal = [one for one in errors if one.code in ("C06", "C08", "C09", "C17") or not request.force]
        if fatal:
            against = "" if base is None else f" with {base.reference}"
            raise Incompatible(f"{source.reference} cannot be merged{against}; nothing was stored", fatal)
        findings += (one for one in found if one.severity in ("error", "warning", "undecided") and one not in findings)
        _refuse_obstacles(source, request.method, into_base=into_base)
        if into_base and request.attention_out is None:
            _ask_attention_out(source)
    _refuse_unlike(sources, into_base=into_base)
    return findings, notes, tuple(placings)


def _refuse_obstacles(source: MergeSource, method: str, *, into_base: bool) -> None:
    """
    Raises:
        InvalidInput: a module whose change is no product of factors, or no module at all.
    """
    if source.side.config is not None and source.side.config.peft_type != "LORA":
        raise InvalidInput(
            f"{source.reference} is of the tuner {shown(source.side.config.peft_type, 80)}; LoRA alone is merged here"
        )
    if not source.modules:
        raise InvalidInput(f"{source.reference} has no module with LoRA factors, so there is nothing to merge")
    left = [one.module for one in source.side.targets if one.rank and one.module not in source.modules]
    if left:
        raise InvalidInput(f"{source.reference}: the factors of {shown(left[0], 200)} cannot be read; 'registry check'")
    config = source.side.config
    if config is not None and config.document.get("alora_invocation_tokens"):
        raise InvalidInput(f"{source.reference} is an aLoRA, which works after certain tokens alone: no sum of it is")
    for path, module in source.modules.items():
        dora = "dora" in module.target.kind.split("+")
        if into_base and dora and method in SUMS:
            continue  # merged through its magnitude
        if module.obstacle:
            mend = "; merge it into its base with --into-base, and 'registry extract' what you need" if dora else ""
            raise InvalidInput(
                f"{source.reference} cannot be merged into an adapter: {shown(path, 200)}: {module.obstacle}{mend}"
                if not into_base
                else f"{source.reference} cannot be merged into a base by {method}: {shown(path, 200)}: "
                f"{module.obstacle}{'; the methods ' + ' and '.join(SUMS) + ' can' if dora else ''}"
            )


def _attention_out(source: MergeSource) -> str | None:
    """The out_proj of a MultiheadAttention that an adapter changes."""
    return next((path for path, one in source.modules.items() if one.target.kind.startswith("attention_out")), None)


def _ask_attention_out(source: MergeSource) -> None:
    """
    Raises:
        InvalidInput: the adapter changes the out_proj of a MultiheadAttention.
    """
    path = _attention_out(source)
    if path is not None:
        raise InvalidInput(
            f"{source.reference} changes {shown(path, 200)}, the out_proj of a MultiheadAttention, whose update PEFT "
            "up to "
            "0.21 adds twice, also while it trains: say with --attention-out 2 to merge what it computed there, or "
            "with "
            "--attention-out 1 what its factors say"
        )


def _refuse_unlike(sources: Sequence[MergeSource], *, into_base: bool) -> None:
    """
    Raises:
        InvalidInput: options that the sources must share, and do not.
    """
    if into_base:
        return
    configs = [source.side.config for source in sources]
    for name in ("layer_replication", "target_parameters"):
        values = {source.reference: getattr(one, name) for source, one in zip(sources, configs, strict=True) if one}
        first = next(iter(values.items()), None)
        other = next(((ref, value) for ref, value in values.items() if first and value != first[1]), None)
        if first is not None and other is not None:
            raise InvalidInput(
                f"{name} differs: {shown(str(first[1]), 100)} in {first[0]}, {shown(str(other[1]), 100)} in "
                f"{other[0]}; "
                "no adapter has both"
            )


def _refuse_contained(connection: Connection, base: Base, sources: Sequence[MergeSource]) -> None:
    """
    Raises:
        InvalidInput: the base was made of a source already, as its lineage says.
    """
    edges = walk(connection, base.id, up=True)
    reached = {base.id}
    for edge in edges:
        if edge.child_id in reached and edge.relation in _CONTAINING:
            reached.add(edge.parent_id)
    contents = {one.content_digest: one.id for one in records(connection, sorted(reached)) if one.kind == "adapter"}
    extracted = {
        edge.child_id
        for source in sources
        for edge in walk(connection, source.record.id, up=True)
        if edge.relation == "extracted_from" and edge.parent_id in reached
    }
    for source in sources:
        known = contents.get(source.record.content_digest)
        if known is None and source.record.id in extracted:
            known = source.record.id
        if known is not None:
            name = references(connection, [known])[known]
            raise InvalidInput(
                f"{base.reference} contains {name} already, as its lineage says ('registry log {base.reference} "
                "'): merged again it would count twice; --force merges all the same"
            )


def _check_sizes(connection: Connection, sources: Sequence[MergeSource]) -> None:
    """
    Raises:
        ShapeMismatch: two sources change modules of one path and of other sizes, or kinds.
    """
    layouts = [source.record.layout_id for source in sources if source.record.layout_id is not None]
    for joined in joined_targets(connection, layouts):
        if joined.sources < 2:
            continue
        sides = (joined.in_features, joined.out_features)
        if joined.kinds > 1 or any(least != most for least, most in sides):
            raise _mismatch(joined.module, sources)
    for path, shapes in _shapes(sources).items():
        if len({shape[:3] for _, shape in shapes}) > 1:
            raise _mismatch(path, sources)


def _shapes(sources: Sequence[MergeSource]) -> dict[str, list[tuple[str, tuple[int, int, int, int]]]]:
    found: dict[str, list[tuple[str, tuple[int, int, int, int]]]] = {}
    for source in sources:
        for path, module in source.modules.items():
            found.setdefault(path, []).append((source.reference, update_shape(module, source.side.layout)))
    return found


def _mismatch(path: str, sources: Sequence[MergeSource]) -> ShapeMismatch:
    having = [(one.reference, one.modules[path]) for one in sources if path in one.modules]
    told = [
        f"{module.target.kind.partition('+')[0]} ({module.target.in_features}, {module.target.out_features}) in {name}"
        for name, module in having
    ]
    distinct = list(dict.fromkeys(told))
    return ShapeMismatch(
        f"the module {shown(path, 200)} is of several (in, out): {', '.join(distinct[:3])}; these adapters are of "
        "different bases"
    )


def _widest(sources: Sequence[MergeSource]) -> str:
    """The dtype that holds the factors of all sources."""
    codes = {
        source.side.layout.by_name[name].dtype
        for source in sources
        for module in source.modules.values()
        for name in (module.a, module.b)
    }
    if len(codes) == 1 and codes <= {"F32", "BF16", "F16", "F64"}:
        return next(iter(codes))
    return "F64" if "F64" in codes else "F32"
