"""Which tensors of a file are referenced where they lie already, and which become a new blob."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from registry.catalog.blobs import StoredTensor
from registry.core.layout import Layout

MIN_SAVING_BYTES = 1 << 20
MIN_SAVING_SHARE = 0.01


@dataclass(frozen=True)
class Plan:
    """Where each tensor of a file will lie.

    Attributes:
        reused: for a layout position, the stored tensor that it is.
        repeats: for a layout position, an earlier position that holds the same tensor.
        new: positions whose bytes must be stored.
    """

    reused: Mapping[int, StoredTensor]
    repeats: Mapping[int, int]
    new: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether the file shares nothing and is stored byte for byte."""
        return not self.reused and not self.repeats


NOTHING_STORED = Plan({}, {}, ())
"""For files whose bytes stay elsewhere."""


def worth_it(saving: int, file_size: int) -> bool:
    """Whether a saving justifies that a version hangs on one blob more."""
    return saving > 0 and (saving >= MIN_SAVING_BYTES or saving >= MIN_SAVING_SHARE * file_size)


def plan_reuse(
    layout: Layout,
    digests: Sequence[str],
    candidates: Iterable[Mapping[str, StoredTensor]],
    *,
    file_size: int,
) -> Plan:
    """Takes the blob that saves most, again and again, until none is worth it; the same rule then
    decides about repeats inside the file.

    Args:
        digests: tensor digests in layout order.
        candidates: stored tensors by digest, the preferred source first (the declared base, then what was found).
        file_size: bytes of the file.
    """
    options: dict[str, dict[int, StoredTensor]] = {}
    for source in candidates:
        for position, digest in enumerate(digests):
            stored = source.get(digest)
            if stored is not None:
                options.setdefault(stored.blob, {}).setdefault(position, stored)
    sizes = [spec.nbytes for spec in layout]
    reused: dict[int, StoredTensor] = {}
    while options:
        savings = {
            blob: _distinct_bytes((p for p in positions if p not in reused), digests, sizes)
            for blob, positions in options.items()
        }
        best = max(savings, key=lambda blob: savings[blob])
        if not worth_it(savings[best], file_size):
            break
        for position, stored in options.pop(best).items():
            reused.setdefault(position, stored)
    first: dict[str, int] = {}
    repeats: dict[int, int] = {}
    for position, digest in enumerate(digests):
        if position not in reused and first.setdefault(digest, position) != position:
            repeats[position] = first[digest]
    if not reused and not worth_it(sum(sizes[position] for position in repeats), file_size):
        repeats = {}
    new = tuple(p for p in range(len(digests)) if p not in reused and p not in repeats)
    return Plan(reused, repeats, new)


def _distinct_bytes(positions: Iterable[int], digests: Sequence[str], sizes: Sequence[int]) -> int:
    return sum({digests[position]: sizes[position] for position in positions}.values())
