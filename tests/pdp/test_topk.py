"""The best checkpoints, beyond `test_parts`: files that are written over, values that are no numbers, a run that goes
on, and states that are none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pdp.topk import TopKCheckpointManager
from registry.core.errors import InvalidInput


def save(manager: TopKCheckpointManager, **data: Any) -> str | None:
    path = manager.get_ckpt_path(data)
    if path is None:
        return None
    Path(path).write_text("checkpoint")
    manager.prune()
    return Path(path).name


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def test_the_name_of_a_file_is_the_one_of_diffusion_policy(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "train_loss")
    assert save(manager, epoch=7, train_loss=0.12345) == "epoch=007-train_loss=0.123.ckpt"
    assert manager.get_ckpt_path({"epoch": 8, "train_loss": 0.5}) is None


def test_a_save_that_fails_leaves_the_file_before(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="e{epoch}")
    save(manager, epoch=0, loss=2.0)
    assert manager.get_ckpt_path({"epoch": 1, "loss": 1.0}) == str(tmp_path / "e1")  # and nothing is written
    assert names(tmp_path) == ["e0"]


def test_the_next_question_deletes_what_was_displaced(tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="e{epoch}")
    save(manager, epoch=0, loss=2.0)
    path = manager.get_ckpt_path({"epoch": 1, "loss": 1.0})
    assert path is not None
    Path(path).write_text("checkpoint")
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


@pytest.mark.parametrize("value", [None, "good", torch.zeros(2)])
def test_a_metric_that_is_no_number_is_named(value: Any, tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="e{epoch}")
    with pytest.raises(InvalidInput, match=r"the metric loss is .*; expected a number"):
        manager.get_ckpt_path({"epoch": 0, "loss": value})


@pytest.mark.parametrize("name", ["/etc/e", "a/../../e", "..", "sub/e", ""])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="{name}")
    with pytest.raises(InvalidInput, match="expected the name of a file in the folder"):
        manager.get_ckpt_path({"name": name, "loss": 1.0})
    assert manager.state_dict() == {"kept": {}}


@pytest.mark.parametrize("state", [{}, {"kept": None}, {"kept": {"e0": "low"}}])
def test_a_state_that_is_none_is_refused_and_changes_nothing(state: dict[str, Any], tmp_path: Path) -> None:
    manager = TopKCheckpointManager(str(tmp_path), "loss", format_str="e{epoch}")
    save(manager, epoch=0, loss=1.0)
    with pytest.raises(InvalidInput, match="state of the best checkpoints"):
        manager.load_state_dict(state)
    assert manager.state_dict() == {"kept": {"e0": 1.0}}


def test_k_is_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="k is -1"):
        TopKCheckpointManager(str(tmp_path), "loss", k=-1)
