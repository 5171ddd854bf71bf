"""Data sets of demonstrations: checked as a whole when they are opened, and cut into the windows that a policy trains
on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pdp.data_files import FINGERPRINT, PLACES, DatasetError, fingerprint_of, read_dataset, write_dataset
from registry.core.errors import InvalidInput
from registry.core.reference import shown

__all__ = ["SPLITS", "DatasetError", "SequenceDataset", "write_dataset"]

SPLITS = ("train", "val")


class SequenceDataset(Dataset[dict[str, Tensor]]):
    """Windows of T_obs + T_action - 1 steps, each within one episode.

    A window's observations are its first T_obs steps, its actions the last T_action: the first action belongs to the
    last observation. Every step of an episode is the last observation of one window; before the first step the first
    is repeated, after the last one the last. All data are held in memory, as float32.

    Args:
        path: a zarr folder or zip, or an HDF5 file (`.h5`, `.hdf5`); only read. It has obs (N, obs_dim), action
            (N, action_dim) and episode_ends (E,): the row after each episode's last, ascending, the last of them N.
            At the top, or as `data/obs`, `data/action`, `meta/episode_ends`.
        split: `train` or `val`: whole episodes, which of them is a function of `seed`.
        val_ratio: part of the episodes that is for validation, from 0 to below 1.
        keys: other names of the arrays, such as `{"obs": "state"}` for `data/state`.

    Attributes:
        obs_dim, action_dim: sizes of one step.
        episode_count, window_count: episodes and windows of this split.
        recipe: what the file's attributes say of how it was made.

    Raises:
        SourceNotFound: there is no such file or folder.
        DatasetError: another format, an array that is missing, cut short, of another form, or not finite, or data
            that are no longer those that `write_dataset` wrote.
        StorageError: it cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        T_obs: int,
        T_action: int,
        *,
        split: str = "train",
        val_ratio: float = 0.0,
        seed: int = 0,
        keys: Mapping[str, str] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise InvalidInput(f"split is {shown(repr(split))}; expected one of {', '.join(SPLITS)}")
        if T_obs < 1 or T_action < 1:
            raise InvalidInput(f"T_obs {T_obs}, T_action {T_action}: expected 1 at least")
        if not 0 <= val_ratio < 1:
            raise InvalidInput(f"val_ratio is {val_ratio}; expected 0 to below 1")
        if odd := sorted(set(keys or {}) - PLACES.keys()):
            raise InvalidInput(f"keys has {shown(repr(odd[0]))}; expected some of {', '.join(PLACES)}")
        self.path = Path(path)
        self.T_obs = T_obs
        self.T_action = T_action
        what = shown(str(self.path), 200)
        arrays, self.recipe, said = read_dataset(self.path, keys or {}, what)
        self._obs, self._action = torch.from_numpy(arrays["obs"]), torch.from_numpy(arrays["action"])
        self._ends = arrays["episode_ends"]
        # Under other names the arrays may be others than those that were written.
        if said is not None and not keys and said != self.fingerprint:
            raise DatasetError(
                f"{what} is damaged: it was written with the fingerprint {shown(str(said))}, and its data now have "
                f"{self.fingerprint}; copy it again. If they were changed on purpose: write it with write_dataset, or "
                f"take its attribute {FINGERPRINT} away"
            )
        self.obs_dim, self.action_dim = self._obs.shape[1], self._action.shape[1]
        self._episodes = self._choose(split, val_ratio, seed)
        starts = numpy.concatenate(([0], self._ends[:-1]))
        rows = [numpy.arange(starts[one], self._ends[one]) for one in self._episodes]
        self._rows = numpy.concatenate(rows) if rows else numpy.zeros(0, dtype=numpy.int64)
        self._first = numpy.repeat(starts[self._episodes], self._ends[self._episodes] - starts[self._episodes])
        self._last = numpy.repeat(self._ends[self._episodes], self._ends[self._episodes] - starts[self._episodes]) - 1

    def _choose(self, split: str, val_ratio: float, seed: int) -> Any:
        count = len(self._ends)
        held_out = min(max(round(count * val_ratio), 1 if val_ratio > 0 else 0), count - 1)
        order = numpy.random.default_rng(seed).permutation(count)
        chosen = order[:held_out] if split == "val" else order[held_out:]
        return numpy.sort(chosen)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def episode_count(self) -> int:
        return len(self._episodes)

    @property
    def window_count(self) -> int:
        return len(self)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`obs` (T_obs, obs_dim) and `action` (T_action, action_dim), float32."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        row, first, last = int(self._rows[index]), int(self._first[index]), int(self._last[index])
        steps = torch.arange(row - self.T_obs + 1, row + self.T_action).clamp(first, last)
        return {"obs": self._obs[steps[: self.T_obs]], "action": self._action[steps[self.T_obs - 1 :]]}

    def tensors(self) -> dict[str, Tensor]:
        """All steps of this split, each once: `obs` (n, obs_dim) and `action` (n, action_dim)."""
        rows = torch.from_numpy(self._rows)
        return {"obs": self._obs[rows], "action": self._action[rows]}

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over all of the data: equal for equal data, whatever file they lie in."""
        return fingerprint_of(self._obs.numpy(), self._action.numpy(), self._ends)
