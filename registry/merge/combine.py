"""Takes updates of modules through a method: modules of one shape that the same sources change go together as a batch,
the result is cut to the rank that was asked for, and held against the true weighted sum. Nothing is read here: each
module brings what gives its factors when its turn comes, so memory is that of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from registry.core.errors import InvalidInput
from registry.core.reference import shown
from registry.merge.compress import RankChoice, cut_dense, cut_low_rank
from registry.merge.group import Group, Options
from registry.merge.low_rank import LowRank
from registry.merge.method import Method

BATCH_BYTES = 16 << 20
"""Of factors, or of dense updates, that are worked on at a time on the CPU; one matrix may be larger."""
DEVICE_BATCH_BYTES = 256 << 20
"""The same on another device, which many matrices have to fill."""
_EXACT_ENOUGH = 1e-6
"""Relative error below which a difference of squares has no digits left, and a QR is paid for."""


@dataclass(frozen=True)
class SourceUpdate:
    """What one source does to one module.

    Attributes:
        source: its number among all sources of the merge.
        rank: of each block.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r).
        weight: what the user gave.
        read: gives the factors, without the scaling: a (blocks, r, in), b (blocks, out, r).
    """

    source: int
    rank: int
    scaling: float
    weight: float
    read: Callable[[], LowRank]


@dataclass(frozen=True)
class ModuleInputs:
    """One module with the updates of the sources that change it.

    Attributes:
        shape: (blocks, out, in) of the update.
        updates: in the order of the sources; at least one.
    """

    path: str
    shape: tuple[int, int, int]
    updates: tuple[SourceUpdate, ...]


@dataclass(frozen=True, eq=False)
class MergedUpdate:
    """The merged update of one module, in the precision of the arithmetic.

    Attributes:
        factors: None where a dense update was asked for.
        dense: (blocks, out, in), or None.
        norm: Frobenius norm of the true weighted sum.
        error: Frobenius norm of the difference of the result to the true weighted sum.
        rank: of the result; None for a dense one.
        of_ranks: sum of the sources' ranks.
    """

    path: str
    factors: LowRank | None
    dense: Tensor | None
    norm: float
    error: float
    rank: int | None
    of_ranks: int


@dataclass(frozen=True)
class Arithmetic:
    """How it is computed.

    Attributes:
        dtype: float32, or float64.
        device: of torch.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def combine(
    modules: Sequence[ModuleInputs],
    method: Method,
    options: Options,
    choice: RankChoice,
    *,
    arithmetic: Arithmetic = Arithmetic(),
    dense: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[MergedUpdate]:
    """Merges modules, in batches of one shape; the order of the results is that of the batches.

    Args:
        choice: of the result's rank.
        dense: a method that makes dense updates gives them as they are: they go into a base. Others give factors, cut
            to nothing.
        note: told what the user should know, such as that the device was out of memory.

    Raises:
        InvalidInput: a source is not finite, or the method refuses.
        ShapeMismatch: factors of a module that are of other sizes than its shape.
    """
    batches: dict[tuple[object, ...], list[ModuleInputs]] = {}
    for module in modules:
        kind = (module.shape, tuple((one.source, one.rank) for one in module.updates))
        batches.setdefault(kind, []).append(module)
    for alike in batches.values():
        most = max(
            1,
            (BATCH_BYTES if arithmetic.device == "cpu" else DEVICE_BATCH_BYTES)
            // _bytes_of(alike[0], method, arithmetic.dtype),
        )
        for begin in range(0, len(alike), most):
            yield from _guarded(alike[begin : begin + most], method, options, choice, arithmetic, dense, note)


def _bytes_of(module: ModuleInputs, method: Method, dtype: torch.dtype) -> int:
    blocks, rows, columns = module.shape
    ranks = sum(one.rank for one in module.updates)
    elements = (rows + columns) * ranks * 3
    if method.form == "dense":
        elements += rows * columns * (len(module.updates) + 2)
    return max(1, blocks * elements * (dtype.itemsize))


def _guarded(
    modules: Sequence[ModuleInputs],
    method: Method,
    options: Options,
    choice: RankChoice,
    arithmetic: Arithmetic,
    dense: bool,
    note: Callable[[str], None],
) -> list[MergedUpdate]:
    """One batch; where the device has not the memory for it, one module after the other, and at last on the CPU."""
    try:
        return _batch(modules, method, options, choice, arithmetic, dense)
    except torch.OutOfMemoryError:
        pass  # outside of the handler, which holds what the failed attempt took
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(modules) > 1:
        note(f"{arithmetic.device} has not the memory for {len(modules)} modules at a time: one module at a time")
        alone = ([one] for one in modules)
        return [done for one in alone for done in _guarded(one, method, options, choice, arithmetic, dense, note)]
    if arithmetic.device == "cpu":
        raise MemoryError(f"not enough memory for the module {modules[0].path}")
    note(f"{arithmetic.device} has not the memory for {modules[0].path}: computed on the CPU")
    return _batch(modules, method, options, choice, Arithmetic(arithmetic.dtype), dense)


def _batch(
    modules: Sequence[ModuleInputs],
    method: Method,
    options: Options,
    choice: RankChoice,
    arithmetic: Arithmetic,
    dense: bool,
) -> list[MergedUpdate]:
    group = _group(modules, options, arithmetic)
    merged = method.function(group)
    blocks = modules[0].shape[0]
    if isinstance(merged, Tensor):
        target = group.weighted_sum()
        if dense:
            norm, error = _dense_distance(merged, target)
            return _split(modules, blocks, None, merged, norm, error, None)
        cut = cut_dense(merged, choice, span=target.b, seed=options.seed)
        norm, error = _distances(LowRank(cut.a, cut.b), target)
        return _split(modules, blocks, LowRank(cut.a, cut.b), None, norm, error, cut.ranks)
    if method.exact:
        if dense or (method.name == "cat" and merged.a.shape[1] <= min(modules[0].shape[1:])):
            norm = _norms(merged)
            return _split(modules, blocks, merged, None, norm, torch.zeros_like(norm), None)
        cut = cut_low_rank(merged, choice)
        return _split(modules, blocks, LowRank(cut.a, cut.b), None, cut.norm, cut.error, cut.ranks)
    target = group.weighted_sum()
    result, ranks = merged, None
    if not dense and (choice.rank is not None or choice.energy is not None or _is_wide(merged)):
        cut = cut_low_rank(merged, choice)
        result, ranks = LowRank(cut.a, cut.b), cut.ranks
    norm, error = _distances(result, target)
    return _split(modules, blocks, result, None, norm, error, ranks)


def _is_wide(update: LowRank) -> bool:
    return update.a.shape[1] > min(update.shape[1:])


def _group(modules: Sequence[ModuleInputs], options: Options, arithmetic: Arithmetic) -> Group:
    updates = []
    for place, like in enumerate(modules[0].updates):
        read = [module.updates[place].read() for module in modules]
        for module, update in zip(modules, read, strict=True):
            expected = (module.shape[0], like.rank)
            if update.shape != module.shape or (update.a.shape[0], update.a.shape[1]) != expected:
                raise InvalidInput(
                    f"{shown(module.path, 200)}: source {like.source} has factors of (blocks, out, in) {update.shape} "
                    f"and rank {update.a.shape[1]}; expected {module.shape} and {like.rank}"
                )
        a, b = (
            torch.cat([one.to(arithmetic.device).to(arithmetic.dtype) for one in factors])
            for factors in ([one.a for one in read], [one.b for one in read])
        )
        _refuse_nonfinite(modules, like.source, a, b)
        updates.append(LowRank(a, b))
    blocks = modules[0].shape[0]
    where: Any = {"dtype": arithmetic.dtype, "device": arithmetic.device}
    columns = [[module.updates[place] for module in modules for _ in range(blocks)] for place in range(len(updates))]
    scalings = torch.tensor([[one.scaling for one in row] for row in columns], **where)
    weights = torch.tensor([[one.weight for one in row] for row in columns], **where)
    keys = tuple(f"{module.path}#{block}" for module in modules for block in range(blocks))
    sources = tuple(one.source for one in modules[0].updates)
    return Group(tuple(updates), scalings, weights, keys, sources, options)


def _refuse_nonfinite(modules: Sequence[ModuleInputs], source: int, a: Tensor, b: Tensor) -> None:
    # A sum is finite only where all of its terms are; only then is each one looked at.
    if bool(torch.isfinite(a.sum() + b.sum())):
        return
    blocks = modules[0].shape[0]
    for place, module in enumerate(modules):
        part = slice(place * blocks, (place + 1) * blocks)
        if not bool(torch.isfinite(a[part]).all() and torch.isfinite(b[part]).all()):
            raise InvalidInput(
                f"{shown(module.path, 200)}: a factor of source {source + 1} holds NaN or Inf; leave that version out, "
                "or train it again from its last finite checkpoint"
            )


def _split(
    modules: Sequence[ModuleInputs],
    blocks: int,
    factors: LowRank | None,
    dense: Tensor | None,
    norms: Tensor,
    errors: Tensor,
    ranks: Tensor | None,
) -> list[MergedUpdate]:
    """The batch taken apart into its modules; each has the rank that its widest block needs."""
    per_module = (-1, blocks)
    norm = norms.double().reshape(per_module).square().sum(1).sqrt().tolist()
    error = errors.double().reshape(per_module).square().sum(1).sqrt().tolist()
    widest = None if ranks is None else ranks.reshape(per_module).amax(1).tolist()
    done = []
    for place, module in enumerate(modules):
        part = slice(place * blocks, (place + 1) * blocks)
        of_ranks = sum(one.rank for one in module.updates)
        own: LowRank | None = None
        rank: int | None = None
        if factors is not None:
            rank = factors.a.shape[1] if widest is None else max(1, int(widest[place]))
            own = LowRank(factors.a[part, :rank], factors.b[part, :, :rank])
        matrix = None if dense is None else dense[part]
        done.append(MergedUpdate(module.path, own, matrix, norm[place], error[place], rank, of_ranks))
    return done


# ---------------------------------------------------------------- norms and distances, for each matrix of a batch


def _norms(update: LowRank) -> Tensor:
    gram = (update.b.double().mT @ update.b.double()) * (update.a.double() @ update.a.double().mT)
    return gram.sum((1, 2)).clamp(min=0).sqrt()


def _distances(result: LowRank, target: LowRank) -> tuple[Tensor, Tensor]:
    """Norm of the target, and of its difference to the result: from Gram matrices in float64, and by QR where these
    have no digits left."""
    a = torch.cat((result.a, target.a), dim=1).double()
    b = torch.cat((result.b, -target.b), dim=2).double()
    grams = (b.mT @ b) * (a @ a.mT)
    rank = result.a.shape[1]
    norm = grams[:, rank:, rank:].sum((1, 2)).clamp(min=0).sqrt()
    apart = grams.sum((1, 2)).clamp(min=0).sqrt()
    if bool((apart < _EXACT_ENOUGH * norm).any()):
        core = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.mT, mode="r").R.mT
        apart = torch.linalg.vector_norm(core, dim=(1, 2))
    return norm, apart


def _dense_distance(merged: Tensor, target: LowRank) -> tuple[Tensor, Tensor]:
    """Norm of the target, and of its difference to a dense result, one matrix after the other."""
    norms, errors = [], []
    for matrix, a, b in zip(merged, target.a, target.b, strict=True):
        true = b @ a
        norms.append(torch.linalg.vector_norm(true, dtype=torch.float64))
        errors.append(torch.linalg.vector_norm(true.sub_(matrix), dtype=torch.float64))
    return torch.stack(norms), torch.stack(errors)
