"""How far tensors and updates are apart, from the weights. They are mapped and proven in batches, and tensors go
through float64 in chunks, so that memory stays bounded whatever the size of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from registry.catalog.contents import StoredComponent
from registry.merge.lora_modules import LoraModule, update_of
from registry.merge.low_rank import cosine_of, distance, inner_product, norm
from registry.operations.diff_components import Pair, is_counted, largest_first
from registry.operations.difference import ComponentDifference, ModuleDifference, Norms, TensorDifference
from registry.operations.load import read_tensors
from registry.operations.merging.sources import only
from registry.operations.reading import BlobReader
from registry.store.interface import BlobStore

BATCH_BYTES = 1 << 30
"""Of mapped tensors: what is read for its proof should still be in the page cache when it is computed with."""
CHUNK_ELEMENTS = 1 << 22

Tensors = Mapping[str, Tensor]
Names = tuple[str, ...]


def measure(
    blobs: BlobStore,
    one: StoredComponent,
    two: StoredComponent,
    difference: ComponentDifference,
    modules: Mapping[str, Pair],
) -> ComponentDifference:
    """The same difference with norms: of updates where the factors tell, of tensors otherwise.

    Raises:
        DigestMismatch, BlobNotFound, Corrupt: the store is damaged.
    """
    wanted: list[tuple[ModuleDifference | TensorDifference, Names, Names]] = []
    for module in difference.modules:
        if not module.note:
            a, b = modules[module.module]
            wanted.append((module, (a.a, a.b) if a else (), (b.a, b.b) if b else ()))
    for tensor in difference.tensors:
        if tensor.a is not None and tensor.b is not None and not tensor.module and not tensor.note:
            wanted.append((tensor, (tensor.a.name,), (tensor.b.name,)))
    measured: dict[str, ModuleDifference] = {}
    compared: dict[str, TensorDifference] = {}
    for item, (mine, others) in zip(
        (item for item, _, _ in wanted),
        _read(blobs, one, two, [(names_a, names_b) for _, names_a, names_b in wanted]),
        strict=True,
    ):
        if isinstance(item, ModuleDifference):
            a, b = modules[item.module]
            measured[item.module] = replace(item, norms=update_norms(a, b, mine, others))
            continue
        (x,), (y,) = mine.values(), others.values()
        if item.a is not None and is_counted(item.a):
            compared[item.name] = replace(item, elements=differing_elements(x, y))
        else:
            compared[item.name] = replace(item, norms=tensor_norms(x, y))
    return replace(
        difference,
        modules=largest_first(measured.get(one.module, one) for one in difference.modules),
        tensors=largest_first(compared.get(one.name, one) for one in difference.tensors),
    )


def update_norms(a: LoraModule | None, b: LoraModule | None, mine: Tensors, others: Tensors) -> Norms:
    """Norms of two updates of one module; the update of an adapter that leaves it alone is zero."""
    x = None if a is None else update_of(a, mine)
    y = None if b is None else update_of(b, others)
    norm_x, norm_y = (0.0 if update is None else norm(update) for update in (x, y))
    if x is None or y is None:
        return Norms(norm_x, norm_y, norm_x + norm_y, None)
    return Norms(norm_x, norm_y, distance(x, y), cosine_of(inner_product(x, y), norm_x, norm_y))


def tensor_norms(x: Tensor, y: Tensor) -> Norms:
    """Norms of two float or complex tensors of one shape."""
    squares = [0.0, 0.0, 0.0, 0.0]
    for ours, theirs in _chunks(x, y):
        one, other = ours.double(), theirs.double()
        step = one - other
        for place, (left, right) in enumerate(((one, one), (other, other), (step, step), (one, other))):
            squares[place] += float(left @ right)
    norm_x, norm_y, apart = map(math.sqrt, squares[:3])
    return Norms(norm_x, norm_y, apart, cosine_of(squares[3], norm_x, norm_y))


def differing_elements(x: Tensor, y: Tensor) -> int:
    """How many elements differ, of two integer or boolean tensors of one dtype and shape."""
    return sum(int((ours != theirs).sum()) for ours, theirs in _chunks(x, y))


def _chunks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    flat = [(torch.view_as_real(one) if one.is_complex() else one).reshape(-1) for one in (x, y)]
    for start in range(0, flat[0].numel(), CHUNK_ELEMENTS):
        yield flat[0][start : start + CHUNK_ELEMENTS], flat[1][start : start + CHUNK_ELEMENTS]


# ---------------------------------------------------------------- reading


def _read(
    blobs: BlobStore, one: StoredComponent, two: StoredComponent, wanted: Sequence[tuple[Names, Names]]
) -> Iterator[tuple[Tensors, Tensors]]:
    """The named tensors of both components, request by request, batch by batch."""
    batch: list[tuple[Names, Names]] = []
    size = 0
    for place, names in enumerate(wanted):
        batch.append(names)
        size += sum(
            component.layout.by_name[name].nbytes
            for component, some in zip((one, two), names, strict=True)
            for name in some
        )
        if size >= BATCH_BYTES or place == len(wanted) - 1:
            with BlobReader(blobs) as reader:
                mine, others = (
                    read_tensors(reader, only(component, {name for pair in batch for name in pair[side]}))
                    for side, component in enumerate((one, two))
                )
            for names_a, names_b in batch:
                yield {name: mine[name] for name in names_a}, {name: others[name] for name in names_b}
            batch, size = [], 0
