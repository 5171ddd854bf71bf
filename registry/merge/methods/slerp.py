"""Spherical interpolation of two updates. Norms and angle come from the factors, so no dense update is made."""

from __future__ import annotations

import torch
from torch import Tensor

from registry.core.errors import InvalidInput
from registry.core.reference import shown
from registry.merge.group import Group, weighted_sum
from registry.merge.low_rank import LowRank
from registry.merge.method import method

_STRAIGHT = 0.9995
"""|cosine| from which on the arc is taken for a line, as in mergekit."""
_NO_DIGITS = 1e-12
"""Square of a norm, of that of its factors, below which float64 says nothing of its direction."""


@method("slerp", form="factors", sources=(2, 2), paper="Shoemake 1985, Animating rotation with quaternion curves")
def slerp(group: Group) -> LowRank:
    """The update at w_2 / (w_1 + w_2) of the way from the first to the second, along the arc between them: a sum of
    both with other weights, in the sum of their ranks. A line where they are parallel, or one is zero.

    A source that does not change these matrices is not in the group: its update is zero, so the other's weight is its
    share, and whoever makes the group brings weights that sum to 1 over both sources.

    Raises:
        InvalidInput: not one or two sources; a weight below 0, or both 0.
    """
    if len(group.updates) not in (1, 2):
        raise InvalidInput(f"slerp goes from one source to another: expected 2, found {len(group.updates)}; use cat")
    _check_weights(group)
    if len(group.updates) == 1:
        return group.weighted_sum()
    first, second = group.weights.double()
    shares = _shares(group, second / (first + second))
    return weighted_sum(group.updates, shares.to(group.scalings.dtype) * group.scalings)


def _check_weights(group: Group) -> None:
    least, total = group.weights.amin(0).tolist(), group.weights.sum(0).tolist()
    for matrix, key in enumerate(group.keys):
        if least[matrix] < 0 or (total[matrix] == 0 and len(group.updates) == 2):
            raise InvalidInput(
                f"{shown(key, 200)}: slerp takes weights from 0 on that are not both 0, found "
                f"{group.weights[:, matrix].tolist()}; for others use cat or svd"
            )


def _shares(group: Group, t: Tensor) -> Tensor:
    """(2, batch), float64: what each of the two scaled updates is multiplied by, at t of the way."""
    a, b = [one.a.double() for one in group.updates], [one.b.double() for one in group.updates]
    scalings = group.scalings.double()

    def inner(x: int, y: int) -> Tensor:
        """<s_x B_x A_x, s_y B_y A_y> = s_x s_y tr((B_x^T B_y)(A_y A_x^T))."""
        trace: Tensor = ((b[x].mT @ b[y]) * (a[x] @ a[y].mT)).sum((1, 2))
        return trace * scalings[x] * scalings[y]

    def norm(x: int) -> Tensor:
        """0 where it is no more than rounding."""
        square = inner(x, x)
        of_factors = scalings[x].square() * b[x].square().sum((1, 2)) * a[x].square().sum((1, 2))
        return torch.where(square > _NO_DIGITS * of_factors, square, 0).sqrt()

    norms = norm(0) * norm(1)
    cosine = inner(0, 1) / norms
    straight = (norms == 0) | (cosine.abs() > _STRAIGHT)
    angle = torch.where(straight, 1.0, cosine).acos()
    arc = torch.stack((((1 - t) * angle).sin(), (t * angle).sin())) / angle.sin()
    return torch.where(straight, torch.stack((1 - t, t)), arc)
