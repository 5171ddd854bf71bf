"""Similarity of stored adapters: each pair, module by module. Which modules they share is known from the catalog; their
factors are read a module at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from registry.core.errors import InvalidInput
from registry.core.findings import Finding
from registry.core.reference import shown
from registry.merge.lora_modules import LoraModule, update_of
from registry.merge.similarity import ModuleSimilarity, OverallSimilarity, compare_updates, overall
from registry.operations.context import Context
from registry.operations.merging.report import plain
from registry.operations.merging.sources import MergeSource, SourceTensors, find_sources, read_sources

if TYPE_CHECKING:
    from registry.merge.low_rank import LowRank


@dataclass(frozen=True)
class PairSimilarity:
    """Two adapters.

    Attributes:
        modules: those that both change, in order of path.
        alone: how many only the first, and only the second, changes.
        left_out: module -> why it was not compared.
    """

    a: str
    b: str
    overall: OverallSimilarity
    modules: tuple[ModuleSimilarity, ...]
    alone: tuple[int, int]
    left_out: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        whole = self.overall
        return {
            "a": self.a,
            "b": self.b,
            "cosine": plain(whole.cosine),
            "writes": whole.writes,
            "reads": whole.reads,
            "sign_conflict": whole.conflict,
            "weighted_sign_conflict": whole.weighted_conflict,
            "shared": len(self.modules),
            "alone": list(self.alone),
            "left_out": dict(self.left_out),
            "modules": [
                {
                    "module": one.path,
                    "norms": [plain(value) for value in one.norms],
                    "cosine": plain(one.cosine),
                    "writes": one.writes,
                    "reads": one.reads,
                    "by_chance": list(one.by_chance),
                    "sign_conflict": one.conflict,
                    "weighted_sign_conflict": one.weighted_conflict,
                    "elements": one.elements,
                    "sampled": one.sampled,
                }
                for one in self.modules
            ],
        }


@dataclass(frozen=True)
class Similarity:
    """All pairs.

    Attributes:
        adapters: `namespace/name@number`, in the order in which they were given.
        findings: what was noticed about them, such as NaN.
    """

    adapters: tuple[str, ...]
    pairs: tuple[PairSimilarity, ...]
    findings: tuple[Finding, ...] = ()


def similarity(context: Context, references: Sequence[str], where: Sequence[str] = ()) -> Similarity:
    """Compares adapters pair by pair; see `Registry.similarity`."""
    with context.reading() as connection:
        ids = find_sources(context, connection, references, where)
        if len(ids) < 2:
            raise InvalidInput("one adapter alone is like nothing; give two or more")
        sources = read_sources(context, connection, ids, "a comparison")
    for source in sources:
        if source.side.nonfinite:
            name = min(source.side.nonfinite)
            raise InvalidInput(f"{source.reference}: {shown(name, 200)} holds NaN or Inf, so nothing can be said of it")
        if not source.modules:
            raise InvalidInput(f"{source.reference} has no module with LoRA factors, so there is nothing to compare")
    with SourceTensors(context.store.blobs) as tensors:
        pairs = tuple(_pair(tensors, one, other) for one, other in combinations(sources, 2))
    return Similarity(tuple(one.reference for one in sources), pairs)


def _pair(tensors: SourceTensors, one: MergeSource, other: MergeSource) -> PairSimilarity:
    left_out: dict[str, str] = {}
    shared: list[ModuleSimilarity] = []
    alone: tuple[list[float], list[float]] = ([], [])
    from registry.merge.low_rank import norm

    for path in sorted({*one.modules, *other.modules}):
        having = [source.modules.get(path) for source in (one, other)]
        obstacle = next((module.obstacle for module in having if module is not None and module.obstacle), "")
        if obstacle:
            left_out[path] = obstacle
            continue
        updates = [
            None if module is None else _update(tensors, source, module)
            for source, module in zip((one, other), having, strict=True)
        ]
        first, second = updates
        if first is not None and second is not None:
            shared.append(compare_updates(path, first, second))
        for side, update in enumerate(updates):
            if update is not None and None in updates:
                alone[side].append(norm(update))
    return PairSimilarity(
        one.reference,
        other.reference,
        overall(shared, alone),
        tuple(shared),
        (len(alone[0]), len(alone[1])),
        left_out,
    )


def _update(tensors: SourceTensors, source: MergeSource, module: LoraModule) -> LowRank:
    return update_of(module, tensors.read(source.component, (module.a, module.b)))
