"""Algebra of low-rank updates. What a LoRA adds to a weight is `scaling * B @ A`; norms, inner products and distances
of such updates come from the factors alone, in float64, and only `delta_weight` forms the matrix. Tensors in, numbers
out: nothing here knows of names, files or configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from registry.core.errors import ShapeMismatch


def delta_weight(a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """Dense update of one LoRA layer.

    Args:
        a: (..., r, in_features) down-projection.
        b: (..., out_features, r) up-projection, same device as `a`.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.

    Returns:
        (..., out_features, in_features) in float32. Inputs are not changed.

    Raises:
        ShapeMismatch: the two ranks differ.

    Source: Hu et al. 2021, LoRA, section 4.1.
    """
    _check_factors(a, b)
    return (b.float() @ a.float()) * scaling


@dataclass(frozen=True, eq=False)
class LowRank:
    """One update as its factors: `b @ a`, or a block diagonal (or a stack) of such products. Made by `low_rank`.

    Attributes:
        a: (blocks, r, in_features), float64.
        b: (blocks, out_features, r), float64, with the scaling in it.
    """

    a: Tensor
    b: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, out_features, in_features): what two updates have in common that can be compared."""
        return self.b.shape[0], self.b.shape[1], self.a.shape[2]


def low_rank(a: Tensor, b: Tensor, *, scaling: float) -> LowRank:
    """The update `scaling * b @ a`.

    Args:
        a: (r, in_features), or (blocks, r, in_features) for grouped convolutions and experts.
        b: (out_features, r), or (blocks, out_features, r).
        scaling: may be negative or 0.

    Raises:
        ShapeMismatch: the ranks or the numbers of blocks differ.
    """
    _check_factors(a, b)
    if a.dim() == 2:
        a, b = a[None], b[None]
    return LowRank(a.detach().double(), b.detach().double() * scaling)


def _check_factors(a: Tensor, b: Tensor) -> None:
    if a.dim() < 2 or a.dim() != b.dim() or a.shape[-2] != b.shape[-1] or a.shape[:-2] != b.shape[:-2]:
        raise ShapeMismatch(
            f"A {list(a.shape)} and B {list(b.shape)} are no factors of one update: expected A (..., r, in) and "
            "B (..., out, r)"
        )


def norm(x: LowRank) -> float:
    """Frobenius norm of the update, to rounding relative to ||B|| ||A||: no square is subtracted from another."""
    return _norm_of_product(x.a, x.b)


def inner_product(x: LowRank, y: LowRank) -> float:
    """Sum over all elements of the products of two updates, trace(Y^T X) = sum((B_x^T B_y) * (A_x A_y^T)).

    Raises:
        ShapeMismatch: the updates are of weights of different sizes.
    """
    _check_alike(x, y)
    return float(((x.b.mT @ y.b) * (x.a @ y.a.mT)).sum())


def distance(x: LowRank, y: LowRank) -> float:
    """Frobenius norm of the difference of two updates, whatever their ranks; exactly 0 for equal factors.

    The difference is itself low-rank, in two ways: [B_x, -B_y] [A_x; A_y], and for equal ranks
    [B_x - B_y, B_y] [A_x; A_x - A_y], which is exact to the last digits where the factors are nearly equal. The one of
    smaller terms is taken. ||x||^2 + ||y||^2 - 2 <x, y> would lose half of all digits.

    Raises:
        ShapeMismatch: the updates are of weights of different sizes.
    """
    _check_alike(x, y)
    if x.a.shape == y.a.shape:
        step_a, step_b = x.a - y.a, x.b - y.b
        terms = _size(step_b, x.a) + _size(y.b, step_a)
        if terms <= _size(x.b, x.a) + _size(y.b, y.a):
            return _norm_of_product(torch.cat((x.a, step_a), dim=1), torch.cat((step_b, y.b), dim=2))
    return _norm_of_product(torch.cat((x.a, y.a), dim=1), torch.cat((x.b, -y.b), dim=2))


def cosine(x: LowRank, y: LowRank) -> float | None:
    """Cosine of the angle between two updates, -1 to 1; None where one of them is zero.

    Raises:
        ShapeMismatch: the updates are of weights of different sizes.
    """
    return cosine_of(inner_product(x, y), norm(x), norm(y))


def cosine_of(inner: float, norm_x: float, norm_y: float) -> float | None:
    """The cosine from an inner product and two norms: None for a norm of 0, NaN for what is not finite."""
    if norm_x == 0 or norm_y == 0:
        return None
    if not all(map(math.isfinite, (inner, norm_x, norm_y))):
        return math.nan
    return max(-1.0, min(1.0, inner / norm_x / norm_y))


def _check_alike(x: LowRank, y: LowRank) -> None:
    if x.shape != y.shape:
        raise ShapeMismatch(f"updates of different sizes, (blocks, out, in): {x.shape} and {y.shape}")


def _norm_of_product(a: Tensor, b: Tensor) -> float:
    """||b @ a|| for (blocks, k, in) and (blocks, out, k): rotations to k x k matrices change no norm."""
    core = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.mT, mode="r").R.mT
    return float(torch.linalg.vector_norm(core))


def _size(b: Tensor, a: Tensor) -> float:
    return float(torch.linalg.vector_norm(b) * torch.linalg.vector_norm(a))
