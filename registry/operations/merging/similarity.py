"""Similarity of stored adapters: each pair, module by module. Which modules they share is known from the catalog; their
factors are read, proven and decomposed once, a module at a time, for all pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from registry.core.errors import InvalidInput, ShapeMismatch
from registry.core.reference import shown
from registry.merge.lora_modules import update_of, update_shape
from registry.merge.similarity import (
    MeasuredUpdate,
    ModuleSimilarity,
    OverallSimilarity,
    compare_updates,
    measured,
    overall,
)
from registry.operations.context import Context
from registry.operations.merging.report import plain
from registry.operations.merging.sources import MergeSource, SourceTensors, find_sources, read_sources

NEARLY_ORTHOGONAL = 0.1
"""Largest size of a cosine that is called so, and by how much a sum may then change either update."""


@dataclass(frozen=True)
class PairSimilarity:
    """Two adapters.

    Attributes:
        overall: of the modules that could be compared, and those that one of them alone changes.
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

    @property
    def verdict(self) -> str:
        """What the numbers say of a plain sum of both, in words.

        Whether two adapters still do their tasks together is decided by the model and its data: these are the weights.
        """
        rest = len(self.left_out)
        others = f"; {rest} {'module was' if rest == 1 else 'modules were'} not compared"
        return self._of_the_compared() + (others if rest and self.modules else "")

    def _of_the_compared(self) -> str:
        if not self.modules:
            if self.left_out:
                return "they share no module that could be compared"
            return "they change no module together: a plain sum keeps both"
        cosine, kept = self.overall.cosine, self.overall.kept
        if cosine is None:
            return "one of them changes nothing"
        if kept is None:
            return "their updates are not finite, so nothing can be said"
        amounts = f"along its own direction a plain sum has {kept[0]:.2f} of the first and {kept[1]:.2f} of the second"
        if cosine >= NEARLY_ORTHOGONAL:
            return f"same direction: {amounts}"
        if cosine <= -NEARLY_ORTHOGONAL:
            return f"opposed: {amounts}"
        if max(abs(one - 1) for one in kept) <= NEARLY_ORTHOGONAL:
            return (
                f"nearly orthogonal: a plain sum keeps both ({kept[0]:.2f} of the first, {kept[1]:.2f} of the second)"
            )
        return f"nearly orthogonal, of unequal size: {amounts}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; infinite numbers as the registry spells them."""
        whole = self.overall
        return {
            "a": self.a,
            "b": self.b,
            "verdict": self.verdict,
            **_numbers(whole),
            "by_chance": None if whole.by_chance is None else list(whole.by_chance),
            "shared": len(self.modules),
            "alone": list(self.alone),
            "left_out": dict(self.left_out),
            "modules": [
                {
                    "module": one.path,
                    **_numbers(one),
                    "by_chance": list(one.by_chance),
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
        pairs: in this order as well, the first with all others before the second.
        notes: what is wrong with tensors of an adapter, so that their module is not among the compared, and what it
            has beside updates.
    """

    adapters: tuple[str, ...]
    pairs: tuple[PairSimilarity, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "adapters": list(self.adapters),
            "pairs": [one.to_json() for one in self.pairs],
            "notes": list(self.notes),
        }


def similarity(context: Context, references: Sequence[str], where: Sequence[str] = ()) -> Similarity:
    """Compares adapters pair by pair; see `Registry.similarity`."""
    with context.reading() as connection:
        ids = find_sources(connection, references, where)
        if len(ids) < 2:
            raise InvalidInput("one adapter alone is like nothing; give two or more")
        sources = read_sources(context, connection, ids, "a comparison")
    for source in sources:
        if source.side.nonfinite:
            name = min(source.side.nonfinite)
            raise InvalidInput(f"{source.reference}: {shown(name, 200)} holds NaN or Inf, so nothing can be said of it")
        if not source.modules:
            raise InvalidInput(f"{source.reference} has no module with LoRA factors, so there is nothing to compare")
    obstacles = [_obstacles(source) for source in sources]
    paths = sorted({path for source in sources for path in source.modules}.union(*obstacles))
    for path in paths:
        _check_sizes(path, [source for source in sources if path in source.modules])
    pairs = [_Pair(*both) for both in combinations(range(len(sources)), 2)]
    with SourceTensors(context.store.blobs) as tensors:
        for path in paths:
            updates = [
                None if path in stopped else _update(tensors, source, path)
                for source, stopped in zip(sources, obstacles, strict=True)
            ]
            for pair in pairs:
                pair.add(path, updates, obstacles)
    return Similarity(
        tuple(one.reference for one in sources),
        tuple(_finished(sources, pair) for pair in pairs),
        tuple(_notes(sources)),
    )


@dataclass
class _Pair:
    """What has been found of two sources, by their places."""

    one: int
    other: int
    shared: list[ModuleSimilarity] = field(default_factory=list)
    alone: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, updates: Sequence[MeasuredUpdate | None], obstacles: Sequence[Mapping[str, str]]) -> None:
        """Compares one module; nothing where neither changes it."""
        places = self.one, self.other
        stopped = [obstacles[place][path] for place in places if path in obstacles[place]]
        first, second = (updates[place] for place in places)
        if stopped:
            self.left_out[path] = stopped[0]
        elif first is not None and second is not None:
            self.shared.append(compare_updates(path, first, second))
        elif first is not None:
            self.alone[0].append(first.norm)
        elif second is not None:
            self.alone[1].append(second.norm)


def _finished(sources: Sequence[MergeSource], pair: _Pair) -> PairSimilarity:
    return PairSimilarity(
        sources[pair.one].reference,
        sources[pair.other].reference,
        overall(pair.shared, pair.alone),
        tuple(pair.shared),
        (len(pair.alone[0]), len(pair.alone[1])),
        pair.left_out,
    )


def _obstacles(source: MergeSource) -> dict[str, str]:
    """Why the change of a module is not `scaling * B @ A`, by its path."""
    found = {path: module.obstacle for path, module in source.modules.items() if module.obstacle}
    for target in source.copies:
        if target.kind in ("full", "token"):
            found[target.module] = (
                "a whole copy is no update" if target.kind == "full" else "trained tokens are no update"
            )
    return {path: f"{source.reference}: {why}" for path, why in found.items()}


def _update(tensors: SourceTensors, source: MergeSource, path: str) -> MeasuredUpdate | None:
    """None where the source leaves the module alone."""
    module = source.modules.get(path)
    if module is None:
        return None
    return measured(update_of(module, tensors.read(source.component, (module.a, module.b))))


def _check_sizes(path: str, sources: Sequence[MergeSource]) -> None:
    """
    Raises:
        ShapeMismatch: two of them change weights of different sizes.
    """
    sizes = [update_shape(source.modules[path], source.side.layout)[:3] for source in sources]
    for source, size in zip(sources, sizes, strict=True):
        if size != sizes[0]:
            raise ShapeMismatch(
                f"{shown(path, 200)}: the update of {sources[0].reference} is of size {_size(sizes[0])}, that of "
                f"{source.reference} of size {_size(size)}; they are of different bases: compare adapters of one base"
            )


def _size(size: tuple[int, int, int]) -> str:
    blocks, rows, columns = size
    return f"{rows} x {columns}" if blocks == 1 else f"{blocks} x {rows} x {columns}"


def _notes(sources: Sequence[MergeSource]) -> Iterator[str]:
    for source in sources:
        for finding in source.side.read:
            if finding.severity in ("error", "warning"):
                yield f"{source.reference}: {finding}"
        beside = [one.module for one in source.copies if one.kind not in ("full", "token")]
        if beside:
            yield (
                f"{source.reference} has biases or weights of its own beside the updates, which are not compared: "
                f"{shown(', '.join(beside), 200)}"
            )


def _numbers(one: ModuleSimilarity | OverallSimilarity) -> dict[str, Any]:
    return {
        "norms": [plain(value) for value in one.norms],
        "cosine": plain(one.cosine),
        "writes": one.writes,
        "reads": one.reads,
        "sign_conflict": one.conflict,
        "weighted_sign_conflict": one.weighted_conflict,
        "elements": one.elements,
        "of_elements": one.of_elements,
    }
