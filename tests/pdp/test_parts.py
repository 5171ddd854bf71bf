"""The small parts of training: normaliser, order of data, moving average, best checkpoints, random generators, saving
thread, files."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pdp.ema import EMAModel
from pdp.files import on_cpu, write_file
from pdp.normalizer import LinearNormalizer
from pdp.random_state import fit_random_state, random_state, restore_random_state
from pdp.sampler import ResumableSampler
from pdp.saving import BackgroundSaver
from pdp.topk import TopKCheckpointManager
from registry.core.errors import InvalidInput, StorageError

# ---------------------------------------------------------------- normaliser

DATA = {"obs": torch.tensor([[0.0, 5.0, 1.0], [10.0, 5.0, -1.0], [4.0, 5.0, 3.0]]), "action": torch.randn(20, 2)}


def fitted(**options: Any) -> LinearNormalizer:
    made = LinearNormalizer()
    made.fit(DATA, **options)
    return made


def test_limits_map_each_dimension_onto_the_output_range() -> None:
    found = fitted().normalize({"obs": DATA["obs"]})["obs"]
    assert found.amin(dim=0).tolist() == pytest.approx([-1, 0, -1])
    assert found.amax(dim=0).tolist() == pytest.approx([1, 0, 1])
    wide = fitted(output_min=0.0, output_max=4.0).normalize({"obs": DATA["obs"]})["obs"]
    assert (wide.amin(dim=0)[0].item(), wide.amax(dim=0)[0].item()) == pytest.approx((0, 4))
    assert wide[:, 1].tolist() == pytest.approx([2, 2, 2])


def test_gaussian_gives_mean_zero_and_deviation_one() -> None:
    found = fitted(mode="gaussian").normalize({"action": DATA["action"]})["action"]
    assert found.mean(dim=0).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert found.std(dim=0, unbiased=False).tolist() == pytest.approx([1, 1], abs=1e-5)


def test_without_an_offset_zero_stays_zero() -> None:
    for mode in ("limits", "gaussian"):
        made = fitted(mode=mode, fit_offset=False)
        assert not made.normalize({"obs": torch.zeros(1, 3)})["obs"].any()
        assert made.normalize({"obs": DATA["obs"]})["obs"].abs().max() <= (1.0 if mode == "limits" else 10.0)


@pytest.mark.parametrize("mode", ["limits", "gaussian"])
def test_normalising_and_back_gives_the_data(mode: str) -> None:
    made = fitted(mode=mode)
    found = made.unnormalize(made(DATA))
    assert all(torch.allclose(found[key], one, atol=1e-5) for key, one in DATA.items())


def test_a_state_dict_makes_a_fresh_normaliser_the_same() -> None:
    made = fitted()
    names = set(made.state_dict())
    assert "params_dict.obs.scale" in names
    assert "params_dict.action.input_stats.std" in names
    other = LinearNormalizer()
    assert not other.is_fitted
    other.load_state_dict(made.state_dict())
    assert other.is_fitted
    assert torch.equal(other(DATA)["obs"], made(DATA)["obs"])
    assert not any(one.requires_grad for one in other.parameters())
    within = nn.ModuleDict({"normalizer": LinearNormalizer()})
    within.load_state_dict({f"normalizer.{name}": one for name, one in made.state_dict().items()})
    with pytest.raises(InvalidInput, match=r"normaliser's obs is not one: input_stats\.std"):
        LinearNormalizer().load_state_dict(
            {name: one for name, one in made.state_dict().items() if name != "params_dict.obs.input_stats.std"}
        )


@pytest.mark.parametrize(
    ("data", "options", "named"),
    [
        ({}, {}, "nothing to fit"),
        ({"obs": torch.zeros(0, 3)}, {}, r"obs: expected data of the form \(\.\.\., dim\), found \(0, 3\)"),
        ({"obs": torch.tensor([[1.0], [math.nan]])}, {}, "obs: row 1 has values that are not finite"),
        (DATA, {"mode": "limit"}, "mode is 'limit'; expected one of limits, gaussian"),
        (DATA, {"output_max": -2.0}, "expected min < max"),
    ],
)
def test_data_that_cannot_be_fitted_are_named_and_change_nothing(data: Any, options: Any, named: str) -> None:
    made = fitted()
    before = {name: one.clone() for name, one in made.state_dict().items()}
    with pytest.raises(InvalidInput, match=named):
        made.fit(data, **options)
    assert all(torch.equal(made.state_dict()[name], one) for name, one in before.items())


@pytest.mark.parametrize(
    ("values", "options", "named"),
    [
        (
            [[-3e38], [3e38]],
            {"output_max": 1e-3, "output_min": 0.0},
            "dimension 0, from -3e.38 to 3e.38, has no scale in float32",
        ),
        ([[1.0, 5.0], [2.0, 5.0]], {"range_eps": 0.0}, "dimension 1, from 5 to 5, has no scale"),
        ([[1.0], [2.0]], {"output_max": math.inf}, "dimension 0"),
        (numpy.array([[1e9], [1e9 + 1]]), {}, "which float32 cannot tell apart; take its mean off first"),
    ],
)
def test_a_dimension_that_float32_cannot_scale_is_named(values: Any, options: Any, named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        LinearNormalizer().fit({"a": values}, **options)


def test_arrays_are_normalised_like_tensors() -> None:
    made = fitted()
    assert torch.equal(made.normalize({"obs": DATA["obs"].numpy()})["obs"], made.normalize({"obs": DATA["obs"]})["obs"])
    with pytest.raises(InvalidInput, match="data is a Tensor; expected a mapping"):
        made.fit(DATA["obs"])  # type: ignore[arg-type]


def test_keys_and_sizes_that_were_not_fitted_are_named() -> None:
    with pytest.raises(InvalidInput, match="was not fitted on image; it knows action, obs"):
        fitted().normalize({"image": torch.zeros(1, 3)})
    with pytest.raises(InvalidInput, match=r"obs: expected \(\.\.\., 3\) as the normaliser was fitted, found \(1, 4\)"):
        fitted().unnormalize({"obs": torch.zeros(1, 4)})


# ---------------------------------------------------------------- order of data


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_goes_on_at_any_batch_of_any_epoch(workers: int) -> None:
    sampler = ResumableSampler(23, batch_size=4, seed=7)
    loader = DataLoader(range(23), batch_sampler=sampler, num_workers=workers, generator=torch.Generator())  # type: ignore[arg-type, var-annotated]

    def order(epoch: int, batch: int = 0) -> list[list[int]]:
        sampler.set_position(epoch, batch)
        return [one.tolist() for one in loader]

    for epoch in (0, 3):
        whole = order(epoch)
        assert sorted(index for batch in whole for index in batch) == list(range(23))
        assert [order(epoch, batch) for batch in (1, 5, 6)] == [whole[1:], whole[5:], []]
    assert order(0) != order(1)


def test_orders_of_neighbouring_seeds_and_epochs_differ() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = ResumableSampler(50, batch_size=50, seed=seed)
        sampler.set_position(epoch)
        return tuple(next(iter(sampler)))

    assert len({order(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25


def test_a_last_batch_is_kept_or_dropped() -> None:
    assert [len(one) for one in ResumableSampler(10, batch_size=4, seed=0)] == [4, 4, 2]
    assert [len(one) for one in ResumableSampler(10, batch_size=4, seed=0, drop_last=True)] == [4, 4]
    assert next(iter(ResumableSampler(10, batch_size=4, seed=0, shuffle=False))) == [0, 1, 2, 3]
    with pytest.raises(InvalidInput, match="batch of 0 to 3"):
        ResumableSampler(10, batch_size=4, seed=0).set_position(0, 4)


# ---------------------------------------------------------------- moving average


def test_the_average_is_that_of_the_formula() -> None:
    model = nn.Linear(3, 2)
    ema = EMAModel(model, update_after_step=1, inv_gamma=2.0, power=0.75, max_value=0.5)
    expected = model.weight.detach().double().numpy().copy()
    for step in range(8):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.step(model)
        after = max(0, step - 2)
        decay = 0.0 if after == 0 else min(1 - (1 + after / 2.0) ** -0.75, 0.5)
        expected = decay * expected + (1 - decay) * model.weight.detach().double().numpy()
        assert ema.decay == pytest.approx(decay)
    assert numpy.allclose(ema.averaged_model.weight.numpy(), expected, atol=1e-6)  # type: ignore[union-attr, operator]
    assert ema.state_dict() == {"decay": ema.decay, "optimization_step": 8}


def test_what_does_not_train_batch_norms_and_buffers_are_copied() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    ema = EMAModel(model, min_value=0.9, update_after_step=0)
    for _ in range(4):
        with torch.no_grad():
            for one in (*model.parameters(), model[1].running_mean):
                one.add_(1.0)
        ema.step(model)
    for name, one in ema.averaged_model.state_dict().items():
        is_copy = torch.equal(one, model.state_dict()[name])
        assert is_copy == (not name.startswith("2.")), name


def test_a_shared_parameter_is_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    ema = EMAModel(model, min_value=0.5)
    before = model[0].weight.detach().clone()
    ema.step(model)
    ema.step(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    ema.step(model)
    assert torch.allclose(ema.averaged_model[0].weight, before + 0.5)  # type: ignore[index, operator]


@pytest.mark.parametrize(
    "options", [{"min_value": 0.9, "max_value": 0.5}, {"inv_gamma": 0.0}, {"update_after_step": -1}]
)
def test_numbers_outside_their_range_are_named(options: Any) -> None:
    with pytest.raises(InvalidInput, match=next(iter(options))):
        EMAModel(nn.Linear(1, 1), **options)
    with pytest.raises(InvalidInput, match="other parameters than the average, bias first"):
        EMAModel(nn.Linear(1, 1)).step(nn.Linear(1, 1, bias=False))


# ---------------------------------------------------------------- best checkpoints


def kept(manager: TopKCheckpointManager, values: list[float]) -> list[str | None]:
    found = []
    for epoch, value in enumerate(values):
        path = manager.get_ckpt_path({"epoch": epoch, "loss": value})
        if path is not None:
            Path(path).write_text(str(value))
        found.append(None if path is None else Path(path).name)
    manager.prune()
    return found


@pytest.mark.parametrize(("mode", "left"), [("min", ["e1", "e4"]), ("max", ["e0", "e3"])])
def test_the_best_k_are_kept(mode: str, left: list[str], tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", mode=mode, k=2, format_str="e{epoch}")
    kept(manager, [5.0, 1.0, 3.0, 6.0, 2.0, math.nan])
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert sorted(manager.state_dict()["kept"]) == left


def test_a_displaced_file_stays_until_the_new_one_is_written(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", k=1, format_str="e{epoch}")
    kept(manager, [5.0])
    assert manager.get_ckpt_path({"epoch": 1, "loss": 4.0}) == str(tmp_path / "e1")
    assert (tmp_path / "e0").exists()
    (tmp_path / "e1").write_text("4.0")
    manager.prune()
    assert not (tmp_path / "e0").exists()


def test_no_checkpoint_is_kept_where_none_is_wanted_or_it_is_worse(tmp_path: Path) -> None:
    assert kept(TopKCheckpointManager(str(tmp_path), "loss", k=0), [1.0]) == [None]
    manager = TopKCheckpointManager(str(tmp_path), "loss", k=1, format_str="e{epoch}")
    assert kept(manager, [1.0, 1.0, 2.0]) == ["e0", None, None]


def test_what_is_kept_is_known_again_if_its_file_is_there(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", k=3, format_str="e{epoch}")
    kept(manager, [1.0, 2.0, 3.0])
    (tmp_path / "e1").unlink()
    other = TopKCheckpointManager(str(tmp_path), "loss", k=3, format_str="e{epoch}")
    other.load_state_dict({"kept": {**manager.state_dict()["kept"], "../e9": 0.0}})
    assert other.state_dict() == {"kept": {"e0": 1.0, "e2": 3.0}}


@pytest.mark.parametrize(
    ("options", "data", "named"),
    [
        ({"format_str": "../{epoch}"}, {"epoch": 1, "loss": 1.0}, "expected the name of a file in the folder"),
        ({"format_str": "{reward}"}, {"epoch": 1, "loss": 1.0}, "does not go with the metrics epoch, loss"),
        ({"format_str": "e"}, {"epoch": 1}, "no metric loss to choose checkpoints by; there are epoch"),
    ],
)
def test_names_and_metrics_that_do_not_do_are_named(options: Any, data: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=named):
        TopKCheckpointManager(str(tmp_path), "loss", k=1, **options).get_ckpt_path(data)
    with pytest.raises(InvalidInput, match="expected min or max"):
        TopKCheckpointManager(str(tmp_path), "loss", mode="best")


# ---------------------------------------------------------------- random generators


def draws() -> list[Any]:
    return [torch.randn(3).tolist(), numpy.random.randn(3).tolist(), random.random(), random.gauss(0, 1)]


def test_generators_come_back_to_the_state_that_was_taken() -> None:
    random.gauss(0, 1)
    numpy.random.randn()  # each keeps a second number for the next call
    state = random_state()
    first = draws()
    assert draws() != first
    restore_random_state(state, "the test")
    assert draws() == first


def broken_states() -> Iterator[Any]:
    state = random_state()
    python, its = state["python"], state["numpy"]
    words = python["words"].clone()
    words[3] = -1
    yield from ({}, [], None, {**state, "python": {}}, {**state, "torch": torch.zeros(3, dtype=torch.uint8)})
    yield from ({**state, "torch": None}, {**state, "cuda": 5})
    for changed in ({"words": words}, {"words": python["words"][:9]}, {"version": 9}, {"gauss": "much"}):
        yield {**state, "python": {**python, **changed}}
    key = its["key"].clone()
    key[0] = 2**32
    # numpy itself takes a pos of any size, and reads beyond its words.
    for changed in ({"key": key}, {"key": key[:9]}, {"key": its["key"].double()}, {"pos": 10**6}, {"pos": -1}):
        yield {**state, "numpy": {**its, **changed}}
    for changed in ({"pos": 10**400}, {"gauss": math.nan}, {"gauss": 10**400}, {"bit_generator": "PCG64"}):
        yield {**state, "numpy": {**its, **changed}}


@pytest.mark.parametrize("function", [restore_random_state, fit_random_state])
def test_what_is_no_state_is_refused(function: Any) -> None:
    for broken in broken_states():
        with pytest.raises(InvalidInput, match="the checkpoint holds no usable state of the random generators"):
            function(broken, "the checkpoint")


def test_a_state_is_tried_without_a_trace_and_taken_over_later() -> None:
    state = random_state()
    first = draws()
    present = random_state()
    second = draws()
    restore_random_state(present, "the test")
    take = fit_random_state(state, "the checkpoint")
    for broken in broken_states():
        with pytest.raises(InvalidInput):
            fit_random_state(broken, "the checkpoint")
    assert draws() == second
    state["torch"].zero_()
    state.clear()
    take()
    assert draws() == first


# ---------------------------------------------------------------- saving thread and files


def test_saves_run_one_after_the_other_and_each_failure_is_raised_once() -> None:
    saver, done = BackgroundSaver(), []

    def fail() -> None:
        raise StorageError("no disk")

    saver.start(lambda: done.append(1))
    saver.start(lambda: done.append(2))
    saver.start(fail)
    with pytest.raises(StorageError, match="no disk"):
        saver.start(lambda: done.append(3))
    saver.join()
    assert done == [1, 2]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.pth"
    write_file(path, lambda file: file.write(b"first"))

    def fail(file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        write_file(path, fail)
    assert path.read_bytes() == b"first"
    assert [one.name for one in path.parent.iterdir()] == ["a.pth"]
    with pytest.raises(StorageError, match=r"a\.pth"):
        write_file(path / "below.pth", fail)


def test_what_a_killed_process_left_is_removed_and_what_another_is_writing_is_not(tmp_path: Path) -> None:
    old, new, others = (
        tmp_path / name for name in (".a.pth.01234567.tmp", ".a.pth.89abcdef.tmp", ".b.pth.01234567.tmp")
    )
    for path in (old, new, others):
        path.write_bytes(b"half")
    for path in (old, others):
        os.utime(path, (0, 0))
    write_file(tmp_path / "a.pth", lambda file: file.write(b"whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([new.name, others.name, "a.pth"])


def test_tensors_are_copied_without_what_they_are_views_of_and_stay_one_where_they_were() -> None:
    whole = torch.arange(100.0)
    view, shared = whole[10:12], torch.ones(2)
    found = on_cpu({"view": view, "a": shared, "b": [shared]}, copy=True)
    assert found["view"].untyped_storage().nbytes() == 8
    assert found["a"] is found["b"][0]
    assert found["a"].data_ptr() != shared.data_ptr()
    assert on_cpu({"a": shared})["a"].data_ptr() == shared.data_ptr()


def test_plain_values_stay_what_they_are_and_others_are_named() -> None:
    given = {"a": (1, 2.5, None, True), 3: {"x", "y"}, "n": numpy.float64(0.5), "i": numpy.int64(3), "p": Path("x")}
    assert on_cpu(given) == {"a": (1, 2.5, None, True), 3: ["x", "y"], "n": 0.5, "i": 3, "p": "x"}
    assert type(on_cpu(given)["n"]) is float
    for value in (object(), os.environ.get, numpy.zeros(2)):
        with pytest.raises(InvalidInput, match=r"the checkpoint\['a'\]\[0\]: a \w+ is neither a tensor nor plain data"):
            on_cpu({"a": [value]})


def test_neighbouring_decays_grow() -> None:
    ema = EMAModel(nn.Linear(1, 1))
    decays = [ema.get_decay(step) for step in range(50)]
    assert decays[0] == decays[1] == 0
    assert all(after > before for before, after in pairwise(decays[1:]))
