"""What a merging method works on: weight matrices of one shape that the same sources change, as a batch, each source's
update as factors. A method sees nothing else, so it is a pure function of tensors and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from registry.merge.low_rank import LowRank

Majority = Literal["total", "frequency"]
Inner = Literal["ties", "dare_ties", "dare_linear", "magnitude_prune"]


@dataclass(frozen=True)
class Options:
    """Parameters of the methods; each reads what its `Method.options` names.

    Attributes:
        density: share of the elements that is kept, above 0, at most 1.
        majority: how a sign is elected: `total` by the sum of the elements, `frequency` by their number.
        inner: what KnOTS does with the aligned updates.
        seed: of everything random.
    """

    density: float = 1.0
    majority: Majority = "total"
    inner: Inner = "ties"
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Group:
    """A batch of matrices with the updates of n sources. Source i's update of matrix m is
    `scalings[i, m] * updates[i].b[m] @ updates[i].a[m]`. A matrix is the weight of a module, or one block of it (a
    group of a grouped convolution, an expert).

    Attributes:
        updates: one a source, in its own rank: a (batch, r, in), b (batch, out, r), without the scaling; all of one
            dtype and device.
        scalings: (n, batch), lora_alpha / r or lora_alpha / sqrt(r).
        weights: (n, batch), what the user gave; may be negative or 0.
        keys: one text a matrix, unique in the merge; random numbers depend on it, and not on the batch it is in.
        sources: number of each source in the whole merge: random numbers depend on it.
    """

    updates: tuple[LowRank, ...]
    scalings: Tensor
    weights: Tensor
    keys: tuple[str, ...]
    sources: tuple[int, ...]
    options: Options = field(default=Options())

    @property
    def batch(self) -> int:
        return len(self.keys)

    @cached_property
    def coefficients(self) -> Tensor:
        """(n, batch): weight times scaling."""
        return self.weights * self.scalings

    def scaled_b(self, source: int) -> Tensor:
        """(batch, out, r): a source's B with its scaling in it."""
        return self.updates[source].b * self.scalings[source][:, None, None]

    def delta(self, source: int) -> Tensor:
        """(batch, out, in): a source's dense update, scaled, not weighted."""
        return self.scaled_b(source) @ self.updates[source].a

    def weighted_sum(self) -> LowRank:
        """The true weighted sum of the updates, in the sum of their ranks."""
        return weighted_sum(self.updates, self.coefficients)


def weighted_sum(updates: Sequence[LowRank], coefficients: Tensor) -> LowRank:
    """sum_i c_i B_i A_i as [c_1 B_1 | ...] [A_1; ...].

    Args:
        coefficients: (n, batch).
    """
    b = torch.cat([one.b * c[:, None, None] for one, c in zip(updates, coefficients, strict=True)], dim=2)
    return LowRank(torch.cat([one.a for one in updates], dim=1), b)
