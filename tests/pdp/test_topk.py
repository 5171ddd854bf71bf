"""The best checkpoints, beyond `test_parts`: files that are written over, values that are no numbers, a run that goes
on, and states that are none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pdp.topk import TopKCheckpointManager
from registry.core.errors import InvalidInput, StorageError


def save(manager: TopKCheckpointManager, **data: Any) -> str | None:
    path = manager.get_ckpt_path(data)
    if path is None:
        return None
    write(Path(path))
    manager.prune()
    return Path(path).name


def write(path: Path) -> None:
    """As pdp writes: another file, put in the place of the one before."""
    new = path.with_name("new")
    new.write_text("checkpoint")
    new.replace(path)


NO_VALUES = ("low", None, math.nan, 10**400, [])


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def test_the_name_of_a_file_is_the_one_of_diffusion_policy(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "train_loss")
    assert save(manager, epoch=7, train_loss=0.12345) == "epoch=007-train_loss=0.123.ckpt"
    assert manager.get_ckpt_path({"epoch": 8, "train_loss": 0.5}) is None


@pytest.mark.parametrize("settle", ["prune", "next"])
def test_a_save_that_fails_loses_nothing_and_is_forgotten(settle: str, tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="e{epoch}")
    save(manager, epoch=0, loss=2.0)
    assert manager.get_ckpt_path({"epoch": 1, "loss": 1.0}) == str(tmp_path / "e1")  # and nothing is written
    assert names(tmp_path) == ["e0"]
    if settle == "prune":
        manager.prune()
    else:
        assert manager.get_ckpt_path({"epoch": 2, "loss": 3.0}) is None
    assert names(tmp_path) == ["e0"]
    assert manager.state_dict() == {"kept": {"e0": 2.0}}
    assert save(manager, epoch=3, loss=1.5) == "e3"  # worse than the one that failed, better than the one that is kept
    assert names(tmp_path) == ["e3"]


def test_saves_that_fail_one_after_the_other_lose_nothing(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", k=2, format_str="e{epoch}")
    for epoch, loss in ((0, 4.0), (1, 5.0)):
        save(manager, epoch=epoch, loss=loss)
    for epoch, loss in ((2, 3.0), (3, 2.0), (4, 1.0)):
        assert manager.get_ckpt_path({"epoch": epoch, "loss": loss}) is not None
    manager.prune()
    manager.prune()
    assert names(tmp_path) == ["e0", "e1"]
    assert manager.state_dict() == {"kept": {"e0": 4.0, "e1": 5.0}}


def test_an_older_file_of_the_name_does_not_pass_for_the_new_one(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="e{epoch}")
    (tmp_path / "e1").write_text("of another run")
    save(manager, epoch=0, loss=2.0)
    assert manager.get_ckpt_path({"epoch": 1, "loss": 1.0}) is not None  # and nothing is written
    manager.prune()
    assert names(tmp_path) == ["e0", "e1"]
    assert manager.state_dict() == {"kept": {"e0": 2.0}}
    assert save(manager, epoch=1, loss=1.0) == "e1"
    assert names(tmp_path) == ["e1"]


def test_a_file_that_was_to_be_written_over_and_was_not_keeps_its_value(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="best")
    save(manager, loss=2.0)
    assert manager.get_ckpt_path({"loss": 1.0}) is not None  # and nothing is written
    manager.prune()
    assert manager.state_dict() == {"kept": {"best": 2.0}}


def test_a_file_that_cannot_be_deleted_is_named_once(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="e{epoch}")
    save(manager, epoch=0, loss=2.0)
    (tmp_path / "e0").unlink()
    (tmp_path / "e0").mkdir()
    with pytest.raises(StorageError, match=r"e0 is no more among the best checkpoints, and cannot be deleted"):
        save(manager, epoch=1, loss=1.0)
    assert save(manager, epoch=2, loss=0.5) == "e2"
    assert names(tmp_path) == ["e0", "e2"]


def test_the_next_question_deletes_what_was_displaced(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="e{epoch}")
    save(manager, epoch=0, loss=2.0)
    path = manager.get_ckpt_path({"epoch": 1, "loss": 1.0})
    assert path is not None
    write(Path(path))
    assert names(tmp_path) == ["e0", "e1"]
    assert manager.get_ckpt_path({"epoch": 2, "loss": 3.0}) is None
    assert names(tmp_path) == ["e1"]


def test_a_file_that_is_written_over_displaces_no_other(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", k=2, format_str="e{epoch}")
    for epoch, loss in ((0, 1.0), (1, 5.0), (0, 0.5)):
        assert save(manager, epoch=epoch, loss=loss) == f"e{epoch}"
    assert names(tmp_path) == ["e0", "e1"]
    assert manager.state_dict() == {"kept": {"e0": 0.5, "e1": 5.0}}


def test_a_run_that_goes_on_keeps_what_the_whole_run_keeps(tmp_path: Path) -> None:
    values = [5.0, 1.0, 3.0, 6.0, 2.0, 0.5]
    folders = tmp_path / "whole", tmp_path / "resumed"
    for folder in folders:
        folder.mkdir()
        manager = TopKCheckpointManager(str(folder), "loss", k=2, format_str="e{epoch}")
        for epoch, loss in enumerate(values):
            if epoch == 3 and folder.name == "resumed":
                state = manager.state_dict()
                manager = TopKCheckpointManager(str(folder), "loss", k=2, format_str="e{epoch}")
                manager.load_state_dict(state)
            save(manager, epoch=epoch, loss=loss)
    assert names(folders[0]) == names(folders[1]) == ["e1", "e5"]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("value", [math.nan, torch.tensor(math.nan)])
def test_nan_is_never_among_the_best(mode: str, value: Any, tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", mode=mode, k=3, format_str="e{epoch}")
    assert manager.get_ckpt_path({"epoch": 0, "loss": value}) is None
    assert manager.state_dict() == {"kept": {}}


@pytest.mark.parametrize("value", [None, "good", torch.zeros(2), 10**400])
def test_a_metric_that_is_no_number_is_named(value: Any, tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="e{epoch}")
    with pytest.raises(InvalidInput, match=r"the metric loss is .*; expected a number"):
        manager.get_ckpt_path({"epoch": 0, "loss": value})


@pytest.mark.parametrize(
    "name", ["/etc/e", "a/../../e", "..", "sub/e", "", "a\0", "a\nb", "\ud800", "e" * 201, "é" * 101]
)
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="{name}")
    with pytest.raises(InvalidInput, match="expected the name of a file in the folder"):
        manager.get_ckpt_path({"name": name, "loss": 1.0})
    assert manager.state_dict() == {"kept": {}}


@pytest.mark.parametrize("state", [{}, [], {"kept": None}, *({"kept": {"e0": one}} for one in NO_VALUES)])
def test_a_state_that_is_none_is_refused_and_changes_nothing(state: Any, tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="e{epoch}")
    save(manager, epoch=0, loss=1.0)
    with pytest.raises(InvalidInput, match="state of the best checkpoints"):
        manager.load_state_dict(state)
    with pytest.raises(InvalidInput, match=r"run\.ckpt: state of the best checkpoints"):
        manager.fit_state(state, "run.ckpt")
    assert manager.state_dict() == {"kept": {"e0": 1.0}}


def test_a_state_is_taken_over_when_it_is_told_to(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="e{epoch}")
    (tmp_path / "e1").write_text("checkpoint")
    take = manager.fit_state({"kept": {"e1": 1.0, "e2": 2.0, "a" * 999: 3.0}}, "run.ckpt")
    assert manager.state_dict() == {"kept": {}}
    take()
    assert manager.state_dict() == {"kept": {"e1": 1.0}}


@pytest.mark.parametrize(
    ("format_str", "named"),
    [
        ("{epoch:>1000000000}", "at most 3 digits"),
        ("{loss:.1000000f}", "at most 3 digits"),
        ("{loss:0{epoch}}", "at most 3 digits"),
        ("{epoch", "expected a name such as"),
        ("a}", "expected a name such as"),
        (None, "expected a name such as"),
    ],
)
def test_a_name_that_fills_the_memory_or_is_none_is_refused_at_once(format_str: Any, named: str) -> None:
    with pytest.raises(InvalidInput, match=f"format_str .*{named}"):
        TopKCheckpointManager("best", "loss", format_str=format_str)


NAMES = ["train_loss", "val_loss", "lr", "epoch", "global_step"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"monitor_key": "val_los"}, "there is no metric val_los to choose checkpoints by; did you mean val_loss"),
        (
            {"monitor_key": "reward"},
            "there is no metric reward .*; there are epoch, global_step, lr, train_loss, val_loss",
        ),
        ({"format_str": "{val_los}"}, "there is no val_los; did you mean val_loss"),
        ({"format_str": "{train_loss:d}"}, "format_str .* does not go with the metrics"),
        ({"format_str": "{}"}, "format_str .* does not go with the metrics"),
        ({"format_str": "{epoch.real.bits}"}, "format_str .* does not go with the metrics"),
        ({"format_str": "a/{epoch}"}, "expected the name of a file in the folder, of at most 200 characters"),
        ({"format_str": "{epoch:0201d}"}, "at most 3 digits"),
        ({"format_str": "{epoch:201d}"}, "expected the name of a file in the folder, of at most 200 characters"),
    ],
)
def test_metric_and_name_are_tried_before_training_begins(options: Any, named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        TopKCheckpointManager("best", **{"monitor_key": "val_loss", **options}).check(NAMES)


def test_what_goes_with_the_metrics_passes_and_leaves_no_trace(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "val_loss", format_str="{epoch:03d}-{global_step}-{val_loss:.3f}")
    manager.check(NAMES)
    manager.check(iter(NAMES))
    assert manager.state_dict() == {"kept": {}}
    TopKCheckpointManager(str(tmp_path), "reward", k=0, format_str="{reward}").check(NAMES)
    TopKCheckpointManager(str(tmp_path), "train_loss").check(NAMES)


def test_k_is_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="k is -1"):
        TopKCheckpointManager(str(tmp_path), "loss", k=-1)
