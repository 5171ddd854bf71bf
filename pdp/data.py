"""Data sets of demonstrations: zarr folders or HDF5 files with `obs`, `action` and `episode_ends`, checked as a whole
when they are opened, and cut into the windows that a policy trains on."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from registry.core.errors import InvalidInput, SourceNotFound, StorageError
from registry.core.reference import shown
from registry.operations.pull import write_errors

HDF5 = (".h5", ".hdf5")
PLACES = {
    "obs": ("data/obs", "obs"),
    "action": ("data/action", "action"),
    "episode_ends": ("meta/episode_ends", "episode_ends"),
}
"""Where an array may stand: in diffusion_policy's groups, or at the top."""
SPLITS = ("train", "val")


class DatasetError(InvalidInput):
    """A data set that cannot be trained on as it is."""


class SequenceDataset(Dataset[dict[str, Tensor]]):
    """Windows of T_obs + T_action - 1 steps, each within one episode.

    A window's observations are its first T_obs steps, its actions the last T_action: the first action belongs to the
    last observation. Every step of an episode is the last observation of one window; before the first step the first
    is repeated, after the last one the last. All data are held in memory, as float32.

    Args:
        path: a zarr folder or zip, or an HDF5 file (`.h5`, `.hdf5`), with obs (N, obs_dim), action (N, action_dim) and
            episode_ends (E,): the row after each episode's last, ascending, the last of them N. At the top, or as
            `data/obs`, `data/action`, `meta/episode_ends`.
        split: `train` or `val`: whole episodes, which of them is a function of `seed`.
        val_ratio: part of the episodes that is for validation, from 0 to below 1.

    Attributes:
        obs_dim, action_dim: sizes of one step.
        episode_count: episodes of this split.
        recipe: what the file's attributes say of how it was made.

    Raises:
        SourceNotFound: there is no such file or folder.
        DatasetError: another format, an array that is missing, cut short, of another form, or not finite.
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
    ) -> None:
        if split not in SPLITS:
            raise InvalidInput(f"split is {shown(repr(split))}; expected one of {', '.join(SPLITS)}")
        if T_obs < 1 or T_action < 1:
            raise InvalidInput(f"T_obs {T_obs}, T_action {T_action}: expected 1 at least")
        if not 0 <= val_ratio < 1:
            raise InvalidInput(f"val_ratio is {val_ratio}; expected 0 to below 1")
        self.path = Path(path)
        self.T_obs = T_obs
        self.T_action = T_action
        what = shown(str(self.path), 200)
        arrays, self.recipe = _read(self.path, what)
        _check(arrays, what)
        self._ends = arrays["episode_ends"].astype(numpy.int64)
        self._obs = torch.from_numpy(numpy.ascontiguousarray(arrays["obs"], dtype=numpy.float32))
        self._action = torch.from_numpy(numpy.ascontiguousarray(arrays["action"], dtype=numpy.float32))
        _check_finite("obs", self._obs, what)
        _check_finite("action", self._action, what)
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
        digest = hashlib.sha256()
        for array in (self._obs.numpy(), self._action.numpy(), self._ends):
            digest.update(repr(array.shape).encode())
            digest.update(numpy.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


def write_dataset(
    path: str | os.PathLike[str],
    obs: Any,
    action: Any,
    episode_ends: Any,
    *,
    recipe: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Writes a data set: HDF5 for `.h5` and `.hdf5`, else a zarr folder. It is there whole or not at all.

    Args:
        obs: (N, obs_dim), written as float32; action: (N, action_dim); episode_ends: (E,).
        recipe: how it was made; values that JSON has.
        force: replace what is there.

    Returns:
        The path.

    Raises:
        DatasetError: data that could not be trained on.
        InvalidInput: something is there already, or a recipe that is no JSON.
        NoSpace, ReadOnly, StorageError: nothing is there.
    """
    final = Path(path)
    arrays = {
        "obs": numpy.ascontiguousarray(obs, dtype=numpy.float32),
        "action": numpy.ascontiguousarray(action, dtype=numpy.float32),
        "episode_ends": numpy.ascontiguousarray(episode_ends, dtype=numpy.int64),
    }
    what = shown(str(final), 200)
    _check(arrays, what)
    for key in ("obs", "action"):
        _check_finite(key, torch.from_numpy(arrays[key]), what)
    try:
        said: dict[str, Any] = json.loads(json.dumps(dict(recipe or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"the recipe of {what} is no JSON ({error}); give texts, numbers, lists and dicts"
        ) from error
    if final.exists() and not force:
        raise InvalidInput(f"{what} is there already; give another path, or force=True to replace it")
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    with write_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            (_write_hdf5 if final.suffix in HDF5 else _write_zarr)(temporary, arrays, said)
            if final.is_dir():
                shutil.rmtree(final)
            os.replace(temporary, final)
        finally:
            _remove(temporary)
    return final


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _write_zarr(path: Path, arrays: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    import zarr

    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    root.attrs.update(dict(recipe))
    for name, array in arrays.items():
        rows = max(1, min(len(array), (1 << 22) // max(array[:1].nbytes, 1)))
        made = root.create_array(PLACES[name][0], shape=array.shape, dtype=array.dtype, chunks=(rows, *array.shape[1:]))
        made[...] = array


def _write_hdf5(path: Path, arrays: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    import h5py

    with h5py.File(path, "x") as file:
        file.attrs["recipe"] = json.dumps(recipe, sort_keys=True)
        for name, array in arrays.items():
            # Times in the file would make two of the same data differ.
            file.create_dataset(PLACES[name][0], data=array, track_times=False)


# ---------------------------------------------------------------- reading


def _read(path: Path, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.exists():
        raise SourceNotFound(f"no such data set: {what}")
    with _reading_errors(what):
        if path.suffix in HDF5:
            return _read_hdf5(path, what)
        if path.is_dir() or path.suffix == ".zip":
            return _read_zarr(path, what)
    raise DatasetError(
        f"{what}: expected a zarr folder or zip, or an HDF5 file (.h5, .hdf5), found {path.suffix or 'a file'}"
    )


@contextmanager
def _reading_errors(what: str) -> Iterator[None]:
    """What zarr and h5py raise of files that are torn or of another kind, in our words."""
    try:
        yield
    except InvalidInput:
        raise
    except PermissionError as error:
        raise StorageError(error.errno, f"cannot read {what}: {error.strerror}") from error
    except Exception as error:  # decoders of chunks raise errors of their own kinds
        raise DatasetError(
            f"{what} cannot be read: {shown(f'{type(error).__name__}: {error}', 200)}; is it cut short, or another "
            "kind of "
            "file? Copy it or make it again"
        ) from error


def _read_zarr(path: Path, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    import zarr

    with warnings.catch_warnings():
        # Folders of others may have what zarr does not know; it says so, and that is all.
        warnings.simplefilter("ignore")
        root = zarr.open_group(str(path), mode="r")
        arrays = {}
        for name, places in PLACES.items():
            array = next((root[place] for place in places if place in root), None)
            if not isinstance(array, zarr.Array):
                there = sorted(key for key, _ in root.members(max_depth=2))
                raise _missing(name, there, what)
            # A chunk that is not there reads as zeros.
            if array.nchunks_initialized < array.nchunks:
                missing = array.nchunks - array.nchunks_initialized
                raise DatasetError(
                    f"{what}: {name} is cut short: {missing} of its {array.nchunks} chunks are not there; copy the "
                    "whole folder, "
                    "or make the data set again"
                )
            arrays[name] = numpy.asarray(array[...])
        return arrays, {str(key): value for key, value in dict(root.attrs).items()}


def _read_hdf5(path: Path, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    import h5py

    with h5py.File(path, "r") as file:
        arrays = {}
        for name, places in PLACES.items():
            array = next((file[place] for place in places if place in file), None)
            if not isinstance(array, h5py.Dataset):
                there: list[str] = []
                file.visit(there.append)
                raise _missing(name, sorted(there), what)
            arrays[name] = numpy.asarray(array[...])
        recipe = file.attrs.get("recipe")
        if isinstance(recipe, str):
            found = json.loads(recipe)
            return arrays, found if isinstance(found, dict) else {}
        plain = (str, int, float, bool)
        said = {key: value.item() if hasattr(value, "item") else value for key, value in file.attrs.items()}
        return arrays, {key: value for key, value in said.items() if isinstance(value, plain)}


def _missing(name: str, there: list[str], what: str) -> DatasetError:
    found = ", ".join(map(shown, there[:12])) or "nothing"
    return DatasetError(f"{what} has no {name} (nor {PLACES[name][0]}); it has {found}")


def _check(arrays: Mapping[str, Any], what: str) -> None:
    """
    Raises:
        DatasetError: forms that do not go together.
    """
    for name, array in arrays.items():
        dimensions = 1 if name == "episode_ends" else 2
        if array.ndim != dimensions or 0 in array.shape:
            form = "(episodes,)" if dimensions == 1 else "(steps, dim)"
            raise DatasetError(f"{what}: {name} is of the form {array.shape}; expected {form}, none of them 0")
        if array.dtype.kind not in ("iu" if name == "episode_ends" else "iuf"):
            raise DatasetError(
                f"{what}: {name} holds {array.dtype}; expected {'whole ' if dimensions == 1 else ''}numbers"
            )
    steps = {name: len(arrays[name]) for name in ("obs", "action")}
    if steps["obs"] != steps["action"]:
        raise DatasetError(
            f"{what}: obs has {steps['obs']} rows and action {steps['action']}; both need one a step: make the data "
            "set again"
        )
    ends = arrays["episode_ends"].astype(numpy.int64)
    if ends[0] < 1 or bool((numpy.diff(ends) < 1).any()):
        place = 0 if ends[0] < 1 else int((numpy.diff(ends) < 1).argmax()) + 1
        raise DatasetError(f"{what}: episode_ends[{place}] is {ends[place]}; expected ends that ascend, from 1")
    if ends[-1] > steps["obs"]:
        raise DatasetError(
            f"{what} is cut short: its last episode ends at row {ends[-1]}, and obs and action have {steps['obs']} "
            "rows; "
            "copy it again, or take the last episodes out of episode_ends"
        )
    if ends[-1] < steps["obs"]:
        raise DatasetError(
            f"{what}: the last episode ends at row {ends[-1]}, and there are {steps['obs']} rows: "
            f"{steps['obs'] - ends[-1]} "
            "belong to no episode"
        )


def _check_finite(name: str, values: Tensor, what: str) -> None:
    bad = (~values.isfinite()).any(dim=1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DatasetError(
            f"{what}: {name} has values that are not finite, the first at step {row}, in {int(bad.sum())} steps in "
            "all; take these "
            "episodes out"
        )
