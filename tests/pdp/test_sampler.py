"""The order of data, beyond `test_parts`: a stopped run against the whole one over several epochs, and what the order
does not hang on."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from pdp.sampler import ResumableSampler
from registry.core.errors import InvalidInput

SIZE = 23


def run(sampler: ResumableSampler, epochs: int, workers: int = 0, begin: tuple[int, int] = (0, 0)) -> list[list[int]]:
    loader: Any = DataLoader(
        range(SIZE),  # type: ignore[arg-type]
        batch_sampler=sampler,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
    )
    found = []
    for epoch in range(begin[0], epochs):
        sampler.set_position(epoch, begin[1] if epoch == begin[0] else 0)
        found += [batch.tolist() for batch in loader]
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_what_follows_a_stop_is_the_tail_of_the_whole_run(workers: int, drop_last: bool) -> None:
    def made() -> ResumableSampler:
        return ResumableSampler(SIZE, batch_size=4, seed=3, drop_last=drop_last)

    whole, batches = run(made(), 3), len(made())
    for epoch, batch in ((0, 1), (1, 3), (1, batches), (2, batches - 1)):
        assert run(made(), 3, workers, (epoch, batch)) == whole[epoch * batches + batch :]


def test_the_order_neither_needs_nor_moves_the_global_generators() -> None:
    def state() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate()

    before = state()
    first = run(ResumableSampler(SIZE, batch_size=4, seed=3), 2)
    assert state() == before
    torch.manual_seed(99)
    assert run(ResumableSampler(SIZE, batch_size=4, seed=3), 2) == first


def test_the_length_is_that_of_a_whole_epoch_wherever_it_begins() -> None:
    sampler = ResumableSampler(SIZE, batch_size=4, seed=3)
    sampler.set_position(2, 5)
    assert (len(sampler), len(list(sampler))) == (6, 1)
    assert list(ResumableSampler(0, batch_size=4, seed=0)) == []
    assert list(ResumableSampler(3, batch_size=4, seed=0, drop_last=True)) == []


@pytest.mark.parametrize(("epoch", "batch"), [(-1, 0), (0, -1), (0, 7)])
def test_a_position_outside_the_epoch_is_refused_and_not_taken(epoch: int, batch: int) -> None:
    sampler = ResumableSampler(SIZE, batch_size=4, seed=3)
    first = list(sampler)
    with pytest.raises(InvalidInput, match=f"epoch {epoch}, batch {batch}: expected"):
        sampler.set_position(epoch, batch)
    assert list(sampler) == first


@pytest.mark.parametrize(("size", "batch_size"), [(-1, 4), (4, 0)])
def test_sizes_are_checked(size: int, batch_size: int) -> None:
    with pytest.raises(InvalidInput, match=f"size {size} and batch_size {batch_size}"):
        ResumableSampler(size, batch_size=batch_size, seed=0)
