"""Batches, ranks and errors around a method, and what happens where a device has not the memory for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from registry.core.errors import InvalidInput
from registry.merge import combine as combining
from registry.merge.combine import Arithmetic, ModuleInputs, SourceUpdate, combine
from registry.merge.compress import RankChoice
from registry.merge.group import Options
from registry.merge.low_rank import LowRank
from registry.merge.methods import METHODS, OPTIONS, find_method

WIDE = Arithmetic(torch.float64)


def reader(seed: int, blocks: int, rows: int, columns: int, rank: int) -> Callable[[], LowRank]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn((blocks, rank, columns), generator=generator, dtype=torch.float64)
    b = torch.randn((blocks, rows, rank), generator=generator, dtype=torch.float64)
    return lambda: LowRank(a, b)


def module(path: str, rows: int, columns: int, *ranks: int, blocks: int = 1) -> ModuleInputs:
    updates = tuple(
        SourceUpdate(
            source, rank, 0.5 + source, 1.0 - source, reader(hash_of(path) + source, blocks, rows, columns, rank)
        )
        for source, rank in enumerate(ranks)
        if rank
    )
    return ModuleInputs(path, (blocks, rows, columns), updates)


def hash_of(path: str) -> int:
    return sum(map(ord, path))


def true_sum(one: ModuleInputs) -> torch.Tensor:
    return sum(x.weight * x.scaling * (x.read().b @ x.read().a) for x in one.updates)  # type: ignore[return-value]


MODULES = [
    module("a.q", 12, 9, 2, 3),
    module("b.q", 12, 9, 2, 3),
    module("a.v", 12, 9, 3, 3),
    module("c.conv", 6, 20, 1, 2, blocks=3),
    module("d.alone", 12, 9, 0, 4),
]


@pytest.mark.parametrize(
    "name", [one for one in METHODS if not one.endswith("_factors") and one not in ("linear", "slerp")]
)
def test_errors_are_those_of_the_dense_matrices_whatever_the_batch(name: str) -> None:
    options = Options(density=0.5 if "density" in OPTIONS[name] else 1.0)
    choice = RankChoice(3) if name != "cat" else RankChoice()
    found = {one.path: one for one in combine(MODULES, find_method(name), options, choice, arithmetic=WIDE)}
    assert set(found) == {one.path for one in MODULES}
    for one in MODULES:
        made, truth = found[one.path], true_sum(one)
        assert made.factors is not None
        apart = float((made.factors.b @ made.factors.a - truth).norm())
        assert made.norm == pytest.approx(float(truth.norm()), rel=1e-9)
        assert made.error == pytest.approx(apart, rel=1e-6, abs=1e-9 * made.norm)
        (alone,) = combine([one], find_method(name), options, choice, arithmetic=WIDE)
        assert alone.factors is not None
        torch.testing.assert_close(alone.factors.b @ alone.factors.a, made.factors.b @ made.factors.a)


def test_a_factor_that_is_not_finite_names_its_module_and_source() -> None:
    bad = module("b.bad", 12, 9, 2, 3)
    bad.updates[1].read().a[0, 1, 2] = float("nan")
    with pytest.raises(InvalidInput, match=r"b\.bad: a factor of source 2 holds NaN"):
        list(combine([MODULES[0], bad], find_method("cat"), Options(), RankChoice()))


def test_out_of_memory_goes_on_one_module_at_a_time_then_on_the_cpu_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = combining._batch
    tried = []

    def short_of_memory(modules: Any, method: Any, options: Any, choice: Any, arithmetic: Any, dense: Any) -> Any:
        tried.append((len(modules), arithmetic.device))
        if arithmetic.device != "cpu" and (len(modules) > 1 or modules[0].path == "b.q"):
            raise torch.OutOfMemoryError("no memory")
        return plain(modules, method, options, choice, Arithmetic(arithmetic.dtype), dense)

    monkeypatch.setattr(combining, "_batch", short_of_memory)
    notes: list[str] = []
    device = Arithmetic(torch.float64, "cuda")
    found = list(
        combine(MODULES[:2], find_method("svd"), Options(), RankChoice(2), arithmetic=device, note=notes.append)
    )
    assert tried == [(2, "cuda"), (1, "cuda"), (1, "cuda"), (1, "cpu")]
    assert [one.path for one in found] == ["a.q", "b.q"]
    assert notes == [
        "cuda has not the memory for 2 modules at a time: one module at a time",
        "cuda has not the memory for b.q: computed on the CPU",
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no CUDA device here")
def test_a_device_that_is_really_out_of_memory_gives_the_same_result() -> None:
    large = [module(f"{name}.q", 4096, 4096, 16, 16) for name in "abcd"]
    options = Options(density=0.5)
    with_room = list(combine(large, find_method("ties"), options, RankChoice(8), arithmetic=Arithmetic(device="cuda")))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(150 * 2**20 / total)
    notes: list[str] = []
    try:
        found = list(
            combine(
                large,
                find_method("ties"),
                options,
                RankChoice(8),
                arithmetic=Arithmetic(device="cuda"),
                note=notes.append,
            )
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("has not the memory" in note for note in notes)
    for one, other in zip(found, with_room, strict=True):
        assert one.factors is not None
        assert other.factors is not None
        assert one.error == pytest.approx(other.error, rel=1e-3)
