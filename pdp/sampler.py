"""The order in which data are seen: a function of seed and epoch alone, so that a run goes on at any batch of any epoch
without a state of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from registry.core.errors import InvalidInput


class ResumableSampler(Sampler[list[int]]):
    """Batches of indices, for `DataLoader(batch_sampler=...)`.

    The loader draws a seed for its workers from the global generator each time it is iterated; give it a generator of
    its own where that must not be.

    Args:
        size: of the data set.
        seed: with the epoch it gives the order.
        shuffle: False keeps the order of the data.
        drop_last: leave out a last batch that is not full.
    """

    def __init__(self, size: int, *, batch_size: int, seed: int, shuffle: bool = True, drop_last: bool = False) -> None:
        if size < 0 or batch_size < 1:
            raise InvalidInput(f"size {size} and batch_size {batch_size}: expected 0 and 1 at least")
        self._size = size
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._epoch = 0
        self._first = 0

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """The next iteration is over this epoch, and begins at this batch of it. So is each after it, until this is
        called again.

        Raises:
            InvalidInput: an epoch below 0, or a batch that the epoch does not have; the one after the last may be
                given, and gives nothing.
        """
        if epoch < 0 or not 0 <= batch <= len(self):
            raise InvalidInput(
                f"epoch {epoch}, batch {batch}: expected an epoch from 0 and a batch of 0 to {len(self)}"
            )
        self._epoch, self._first = epoch, batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._size // self._batch_size if self._drop_last else -(-self._size // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self._epoch)
        for batch in range(self._first, len(self)):
            yield order[batch * self._batch_size : (batch + 1) * self._batch_size]

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(self._size))
        # One number of the two, and neighbours far apart: seed 1, epoch 0 is not seed 0, epoch 1.
        mixed = (self._seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        found: list[int] = torch.randperm(self._size, generator=generator).tolist()
        return found
