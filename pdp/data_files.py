"""The files of data sets: zarr folders or HDF5 files with `obs`, `action` and `episode_ends`, written whole and checked
as a whole when they are read."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

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
FINGERPRINT = "pdp_fingerprint"
"""The attribute with the fingerprint of the data, beside the recipe."""


class DatasetError(InvalidInput):
    """A data set that cannot be trained on as it is."""


def write_dataset(
    path: str | os.PathLike[str],
    obs: Any,
    action: Any,
    episode_ends: Any,
    *,
    recipe: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Writes a data set: HDF5 for `.h5` and `.hdf5`, else a zarr folder. It is there whole or not at all. The data's
    fingerprint is written beside the recipe, and checked when the data are read.

    Args:
        obs: (N, obs_dim), written as float32; action: (N, action_dim); episode_ends: (E,).
        recipe: how it was made; values that JSON has.
        force: replace what is there.

    Returns:
        The path.

    Raises:
        DatasetError: data that could not be trained on.
        InvalidInput: something is there already, or a recipe that is no JSON or has the fingerprint's name.
        NoSpace, ReadOnly, StorageError: nothing is there.
    """
    final = Path(path)
    what = shown(str(final), 200)
    if final.suffix == ".zip":
        raise DatasetError(f"{what}: a zip is read, not written; write a zarr folder or an HDF5 file (.h5, .hdf5)")
    given = {"obs": obs, "action": action, "episode_ends": episode_ends}
    arrays = {name: _as_array(name, values, what) for name, values in given.items()}
    arrays = _checked(arrays, what)
    fingerprint = fingerprint_of(**arrays)
    try:
        said: dict[str, Any] = json.loads(json.dumps(dict(recipe or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"the recipe of {what} is no JSON ({error}); give texts, numbers, lists and dicts"
        ) from error
    if FINGERPRINT in said:
        raise InvalidInput(f"the recipe of {what} has {FINGERPRINT}, which is written beside it; leave it out")
    if final.exists() and not force:
        raise InvalidInput(f"{what} is there already; give another path, or force=True to replace it")
    mark = secrets.token_hex(4)
    temporary, before = (final.with_name(f".{final.name}.{mark}.{one}") for one in ("tmp", "old"))
    with write_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            (_write_hdf5 if final.suffix in HDF5 else _write_zarr)(temporary, arrays, said, fingerprint)
            _put(temporary, final, before)
        finally:
            _remove(temporary)
    return final


def fingerprint_of(obs: Any, action: Any, episode_ends: Any) -> str:
    """16 hex digits over float32 obs and action and int64 episode_ends."""
    digest = hashlib.sha256()
    for array in (obs, action, episode_ends):
        digest.update(repr(array.shape).encode())
        digest.update(numpy.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _put(temporary: Path, final: Path, before: Path) -> None:
    """Renames to the final name. A folder, or a file that a folder replaces, has to be out of the way first."""
    if not final.exists() or not (final.is_dir() or temporary.is_dir()):
        os.replace(temporary, final)
        return
    os.replace(final, before)
    try:
        os.replace(temporary, final)
    except BaseException:
        os.replace(before, final)
        raise
    _remove(before)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _write_zarr(path: Path, arrays: Mapping[str, Any], recipe: Mapping[str, Any], fingerprint: str) -> None:
    import zarr

    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    root.attrs.update({**recipe, FINGERPRINT: fingerprint})
    for name, array in arrays.items():
        rows = max(1, min(len(array), (1 << 22) // max(array[:1].nbytes, 1)))
        made = root.create_array(
            PLACES[name][0],
            shape=array.shape,
            dtype=array.dtype,
            chunks=(rows, *array.shape[1:]),
            # Else chunks of zeros are left out, and look like chunks that were lost.
            config={"write_empty_chunks": True},
        )
        made[...] = array


def _write_hdf5(path: Path, arrays: Mapping[str, Any], recipe: Mapping[str, Any], fingerprint: str) -> None:
    import h5py

    with h5py.File(path, "x") as file:
        file.attrs["recipe"] = json.dumps(recipe, sort_keys=True)
        file.attrs[FINGERPRINT] = fingerprint
        for name, array in arrays.items():
            # Times in the file would make two of the same data differ.
            file.create_dataset(PLACES[name][0], data=array, track_times=False)


# ---------------------------------------------------------------- reading


def _places(keys: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {name: (f"data/{keys[name]}", keys[name]) if name in keys else places for name, places in PLACES.items()}


def _as_array(name: str, values: Any, what: str) -> Any:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    try:
        return numpy.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DatasetError(
            f"{what}: {name} is no array ({shown(str(error), 200)}); give an array or a tensor"
        ) from error


def _checked(arrays: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The arrays as they are trained on: obs and action in float32, episode_ends in int64."""
    _check(arrays, what)
    found = {name: _as_float32(name, arrays[name], what) for name in ("obs", "action")}
    return {**found, "episode_ends": numpy.ascontiguousarray(arrays["episode_ends"], dtype=numpy.int64)}


def _as_float32(name: str, array: Any, what: str) -> Any:
    with numpy.errstate(over="ignore"):  # what float32 cannot hold is found just below
        values = numpy.require(array, numpy.float32, ["C", "W"])  # torch.from_numpy warns of read-only ones
    bad = ~numpy.isfinite(values).all(axis=1)
    if bad.any():
        raise DatasetError(
            f"{what}: {name} has values that are not finite, or too large for float32, the first at step "
            f"{int(bad.argmax())}, in {int(bad.sum())} steps in all; take these episodes out"
        )
    return values


def read_dataset(path: Path, keys: Mapping[str, str], what: str) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """The checked arrays, obs and action as float32 and episode_ends as int64; the recipe; and the fingerprint that the
    file says its data have, None of files without one. Arguments and errors as for `SequenceDataset`."""
    if not path.exists():
        raise SourceNotFound(f"no such data set: {what}")
    with _reading_errors(what):
        if path.suffix in HDF5:
            arrays, attributes = _read_hdf5(path, _places(keys), what)
        elif path.is_dir() or path.suffix == ".zip":
            arrays, attributes = _read_zarr(path, _places(keys), what)
        else:
            raise DatasetError(
                f"{what}: expected a zarr folder or zip, or an HDF5 file (.h5, .hdf5), found {path.suffix or 'a file'}"
            )
        said = _json_of(attributes).get(FINGERPRINT)
        attributes.pop(FINGERPRINT, None)
        recipe = _recipe_of(attributes) if path.suffix in HDF5 else _json_of(attributes)
        return _checked(arrays, what), recipe, said


@contextmanager
def _reading_errors(what: str) -> Iterator[None]:
    """What zarr and h5py raise of files that are torn or of another kind, in our words."""
    try:
        yield
    except (InvalidInput, MemoryError):
        raise
    except PermissionError as error:
        raise StorageError(error.errno, f"cannot read {what}: {error.strerror}") from error
    except Exception as error:  # decoders of chunks raise errors of their own kinds
        raise DatasetError(
            f"{what} cannot be read: {shown(f'{type(error).__name__}: {error}', 200)}; is it cut short, or another "
            "kind of file? Copy it or make it again"
        ) from error


def _read_zarr(path: Path, wanted: Mapping[str, tuple[str, ...]], what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    import zarr
    from zarr.storage import ZipStore

    with warnings.catch_warnings(), ExitStack() as opened:
        # Folders of others may have what zarr does not know; it says so, and that is all.
        warnings.simplefilter("ignore")
        if not path.is_dir() and not zipfile.is_zipfile(path):
            raise DatasetError(f"{what} is no zip, or is cut short; copy it or make it again")
        # zarr takes the path of a zip for a folder.
        store = str(path) if path.is_dir() else opened.enter_context(ZipStore(path, mode="r"))
        root = zarr.open_group(store, mode="r")
        arrays = {}
        for name, places in wanted.items():
            array = next((root[place] for place in places if place in root), None)
            if not isinstance(array, zarr.Array):
                there = sorted(key for key, _ in root.members(max_depth=2))
                raise _missing(places, there, what)
            # A chunk that is not there reads as zeros.
            if array.nchunks_initialized < array.nchunks:
                missing = array.nchunks - array.nchunks_initialized
                raise DatasetError(
                    f"{what}: {name} is cut short: {missing} of its {array.nchunks} chunks are not there; copy it "
                    "whole, or write it again (with zarr's write_empty_chunks=True: chunks of zeros are left out else)"
                )
            if path.is_dir():
                _refuse_cut_chunks(path / array.path, array, f"{what}: {name}")
            arrays[name] = numpy.asarray(array[...])
        return arrays, dict(root.attrs)


def _refuse_cut_chunks(folder: Path, array: Any, what: str) -> None:
    """Blosc decodes a chunk that is cut by reading on behind it; the length that it should have stands in its
    header. A file of shards is no such chunk, and one that is cut has no index."""
    if array.shards is not None or not any("blosc" in type(one).__name__.lower() for one in array.compressors[-1:]):
        return
    for place in itertools.product(*map(range, array.cdata_shape)):
        key = array.metadata.encode_chunk_key(place)
        with open(folder / key, "rb") as file:
            header = file.read(16)
        size, said = (folder / key).stat().st_size, int.from_bytes(header[12:16], "little")
        if len(header) < 16 or said != size:
            expected = said if len(header) == 16 else "16 at least"
            raise DatasetError(
                f"{what} is cut short: the chunk {key} has {size} bytes of {expected}; copy it whole again"
            )


def _read_hdf5(path: Path, wanted: Mapping[str, tuple[str, ...]], what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    import h5py

    with h5py.File(path, "r") as file:
        arrays = {}
        for name, places in wanted.items():
            array = next((file[place] for place in places if place in file), None)
            if not isinstance(array, h5py.Dataset):
                there: list[str] = []
                file.visit(there.append)
                raise _missing(places, sorted(there), what)
            arrays[name] = numpy.asarray(array[...])
        return arrays, dict(file.attrs.items())


def _recipe_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as `write_dataset` writes it into HDF5; of files of others, the attributes."""
    try:
        found = json.loads(attributes["recipe"])
        if isinstance(found, dict):
            return found
    except (KeyError, TypeError, ValueError):
        pass
    return _json_of(attributes)


def _json_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Those attributes that JSON has."""
    said = {}
    for key, value in attributes.items():
        plain = value.tolist() if isinstance(value, numpy.ndarray | numpy.generic) else value
        try:
            said[str(key)] = json.loads(
                json.dumps(plain.decode() if isinstance(plain, bytes) else plain, allow_nan=False)
            )
        except (TypeError, ValueError):
            continue  # nothing that a recipe could say: a reference, an empty value, bytes
    return said


def _missing(places: tuple[str, ...], there: list[str], what: str) -> DatasetError:
    found = ", ".join(map(shown, there[:12])) or "nothing"
    return DatasetError(f"{what} has no {shown(places[1])} (nor {shown(places[0])}); it has {found}")


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
            "rows; copy it "
            "again, or take the last episodes out of episode_ends"
        )
    if ends[-1] < steps["obs"]:
        raise DatasetError(
            f"{what}: the last episode ends at row {ends[-1]}, and there are {steps['obs']} rows: "
            f"{steps['obs'] - ends[-1]} belong to no episode"
        )
