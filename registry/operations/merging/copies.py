"""What becomes of tensors that are no product of factors: whole copies of modules (`modules_to_save`) and trained
tokens. There is no sum of them that everybody means, so where sources do not agree the user is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from registry.core.adapter_names import canonical_name
from registry.core.errors import InvalidInput, ShapeMismatch
from registry.core.layout import TensorSpec
from registry.core.reference import shown
from registry.operations.merging.request import SAVED
from registry.operations.merging.sources import MergeSource, SourceTensors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CopiedTensor:
    """One tensor that goes into the result as a whole.

    Attributes:
        name: canonical, as `head.weight`.
        parts: (number of the source, name in its layout, share); shares add up to 1.
    """

    name: str
    parts: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class Copies:
    """All of them.

    Attributes:
        sources: numbers of the sources that they are taken from.
        dropped: canonical names of what is left out.
    """

    tensors: tuple[CopiedTensor, ...] = ()
    sources: tuple[int, ...] = ()
    dropped: tuple[str, ...] = ()


def decide_copies(
    sources: Sequence[MergeSource],
    weights_of: Callable[[str], Sequence[float]],
    policy: str | None,
    *,
    into_base: bool,
) -> Copies:
    """Which whole copies the result has.

    Where all sources have the same copies, these are taken without a policy: into a base with weights of 1 alone, into
    an adapter with weights above 0.

    Args:
        weights_of: the weight of each source for a tensor, by its canonical name.
        policy: `drop`, `mean`, the manifest digest of a source, or None.

    Raises:
        InvalidInput: they do not agree, and no policy was given.
        ShapeMismatch: copies of several shapes.
    """
    held = [_held(source) for source in sources]
    names = list(dict.fromkeys(name for one in held for name in one))
    if not names:
        return Copies()
    digests = {name: {one[name][1] if name in one else None for one in held} for name in names}
    if policy == "drop":
        return Copies(dropped=tuple(names))
    if policy is None:
        plain = all(weight == 1 if into_base else weight > 0 for name in names for weight in weights_of(name))
        if plain and all(len(found) == 1 for found in digests.values()):
            first = held[0]
            return Copies(tuple(CopiedTensor(name, ((0, first[name][0].name, 1.0),)) for name in names), (0,))
        raise _asked(sources, held, digests)
    if policy == "mean":
        _refuse_tokens(sources)
        having = tuple(place for place, one in enumerate(held) if one)
        return Copies(tuple(_mean(name, held, weights_of(name)) for name in names), having)
    place = next(place for place, source in enumerate(sources) if source.record.digest == policy)
    chosen = held[place]
    taken = tuple(CopiedTensor(name, ((place, spec.name, 1.0),)) for name, (spec, _) in chosen.items())
    return Copies(taken, (place,), tuple(name for name in names if name not in chosen))


def _held(source: MergeSource) -> dict[str, tuple[TensorSpec, str]]:
    """Canonical name -> (where, digest)."""
    component = source.component
    digests = {spec.name: digest for spec, digest in zip(component.layout, component.tensors, strict=True)}
    return {canonical_name(spec.name): (spec, digests[spec.name]) for spec in source.beside}


def _asked(
    sources: Sequence[MergeSource],
    held: Sequence[Mapping[str, object]],
    digests: Mapping[str, set[str | None]],
) -> InvalidInput:
    name = next((one for one, found in digests.items() if len(found) > 1), next(iter(digests)))
    having = [source.reference for source, one in zip(sources, held, strict=True) if name in one]
    lacking = [source.reference for source, one in zip(sources, held, strict=True) if name not in one]
    differ = f"{_listed(lacking)} has none" if lacking else "they differ, or a weight leaves it open"
    return InvalidInput(
        f"{shown(name, 200)} is a whole copy in {_listed(having)}, and {differ}: say with --saved what the result has: "
        f"{', '.join(SAVED)}, or the reference of the source to take them from"
    )


def _listed(references: Sequence[str]) -> str:
    more = f" and {len(references) - 3} more" if len(references) > 3 else ""
    return ", ".join(references[:3]) + more


def _refuse_tokens(sources: Sequence[MergeSource]) -> None:
    indices = [None if one.side.config is None else one.side.config.trainable_token_indices for one in sources]
    trained = [one for one in indices if one]
    if any(one != trained[0] for one in trained):
        raise InvalidInput("the sources trained different tokens, so there is no mean of them; name the source to take")


def _mean(name: str, held: Sequence[Mapping[str, tuple[TensorSpec, str]]], weights: Sequence[float]) -> CopiedTensor:
    having = [(place, one[name][0]) for place, one in enumerate(held) if name in one]
    shapes = {spec.shape for _, spec in having}
    if len(shapes) > 1:
        raise ShapeMismatch(
            f"copies of {shown(name, 200)} have the shapes {sorted(map(list, shapes))}; name one source"
        )
    total = sum(weights[place] for place, _ in having)
    if total <= 0 or any(weights[place] < 0 for place, _ in having):
        raise InvalidInput(
            f"no mean of {shown(name, 200)}: the weights of the sources that have it are negative, or add up to 0; "
            "name "
            "the source to take it from"
        )
    return CopiedTensor(name, tuple((place, spec.name, weights[place] / total) for place, spec in having))


def copied_tensor(copied: CopiedTensor, sources: Sequence[MergeSource], tensors: SourceTensors) -> Tensor:
    """The tensor itself; a mean is made in float64 and rounded once to the widest dtype of its parts.

    Raises:
        InvalidInput: a mean of what is no float.
    """
    import torch

    read = [(tensors.read(sources[place].component, [name])[name], share) for place, name, share in copied.parts]
    if len(read) == 1:
        return read[0][0]
    dtype = read[0][0].dtype
    for one, _ in read:
        dtype = torch.promote_types(dtype, one.dtype)
    if not dtype.is_floating_point:
        raise InvalidInput(f"{shown(copied.name, 200)} is {dtype}, of which there is no mean; name the source to take")
    total = torch.zeros(read[0][0].shape, dtype=torch.float64)
    for one, share in read:
        total += share * one.double()
    return total.to(dtype)
