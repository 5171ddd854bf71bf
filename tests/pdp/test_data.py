"""Data sets: windows, splits, and every way in which one can be broken."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numcodecs
import numpy
import pytest
import torch
import zarr

from pdp.data import DatasetError, SequenceDataset, write_dataset
from pdp.data_files import FINGERPRINT
from registry.core.errors import InvalidInput, NoSpace, SourceNotFound
from tests.pdp.datasets import synthetic, write_synthetic

SUFFIXES = [".zarr", ".h5"]
COUNTING = {
    "obs": numpy.arange(10, dtype=numpy.float32)[:, None],
    "action": 100 + numpy.arange(10, dtype=numpy.float32)[:, None],
    "episode_ends": [4, 10],
}


def zipped(folder: Path, without: str = "nothing") -> Path:
    path = folder.with_suffix(".zarr.zip")
    with zipfile.ZipFile(path, "w") as file:
        for one in sorted(folder.rglob("*")):
            name = one.relative_to(folder).as_posix()
            if one.is_file() and name != without:
                file.write(one, name)
    return path


def window(data: SequenceDataset, index: int) -> tuple[list[float], list[float]]:
    item = data[index]
    return item["obs"].flatten().tolist(), item["action"].flatten().tolist()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_step_is_the_last_observation_of_one_window_within_its_episode(suffix: str, tmp_path: Path) -> None:
    data = SequenceDataset(write_dataset(tmp_path / f"d{suffix}", **COUNTING), T_obs=3, T_action=2)
    assert (len(data), data.episode_count, data.obs_dim, data.action_dim) == (10, 2, 1, 1)
    assert window(data, 0) == ([0, 0, 0], [100, 101])  # the first step is repeated before the episode
    assert window(data, 2) == ([0, 1, 2], [102, 103])
    assert window(data, 3) == ([1, 2, 3], [103, 103])  # and the last one after it
    assert window(data, 4) == ([4, 4, 4], [104, 105])  # nothing of the episode before
    assert window(data, 9) == ([7, 8, 9], [109, 109])
    with pytest.raises(IndexError):
        data[10]
    assert data[0]["obs"].dtype == torch.float32


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_arrays_may_stand_at_the_top_or_in_groups(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"top{suffix}"
    file: Any = h5py.File(path, "w") if suffix == ".h5" else zarr.open_group(str(path), mode="w")
    for name, values in COUNTING.items():
        array = numpy.asarray(values)
        if suffix == ".h5":
            file[name] = array
        else:
            file.create_array(name, data=array)
    if suffix == ".h5":
        file.close()
    grouped = SequenceDataset(write_dataset(tmp_path / f"grouped{suffix}", **COUNTING), 2, 2)
    assert SequenceDataset(path, 2, 2).fingerprint == grouped.fingerprint


def test_equal_data_have_one_fingerprint_whatever_file_they_lie_in(tmp_path: Path) -> None:
    found = {SequenceDataset(write_synthetic(tmp_path / f"d{suffix}"), 2, 4).fingerprint for suffix in SUFFIXES}
    other = SequenceDataset(write_synthetic(tmp_path / "other.zarr", seed=1), 2, 4)
    assert len(found) == 1
    assert other.fingerprint not in found


def test_the_same_data_are_written_as_the_same_bytes(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        one, two = (write_synthetic(tmp_path / f"{name}{suffix}") for name in ("one", "two"))
        files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()] if one.is_dir() else [Path()]
        assert files
        assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def changed_in_place(path: Path) -> None:
    """Data that can be read and trained on, and are not those that were written."""
    if path.suffix == ".h5":
        with h5py.File(path, "a") as file:
            file["data/action"][3, 0] += 1
    else:
        array: Any = zarr.open_group(str(path), mode="a")["data/action"]
        array[3, 0] = 7.0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_data_that_are_no_longer_those_that_were_written_are_refused(suffix: str, tmp_path: Path) -> None:
    path = write_synthetic(tmp_path / f"d{suffix}")
    fingerprint = SequenceDataset(path, 2, 2).fingerprint
    changed_in_place(path)
    with pytest.raises(
        DatasetError, match=rf"d\{suffix} is damaged: it was written with the fingerprint {fingerprint}"
    ):
        SequenceDataset(path, 2, 2)
    if suffix == ".zarr":
        with pytest.raises(DatasetError, match=r"is damaged: .* fingerprint"):
            SequenceDataset(zipped(path), 2, 2)
        del zarr.open_group(str(path), mode="a").attrs[FINGERPRINT]
    else:
        with h5py.File(path, "a") as file:
            del file.attrs[FINGERPRINT]
    assert SequenceDataset(path, 2, 2).fingerprint != fingerprint  # a file that says nothing is read as it is


def test_the_fingerprint_in_a_file_is_only_of_the_arrays_that_were_written(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d.h5", **COUNTING)
    with h5py.File(path, "a") as file:
        file["data/state"] = COUNTING["action"]
        file.attrs[FINGERPRINT] = numpy.bytes_(file.attrs[FINGERPRINT])  # as other tools write texts
    assert SequenceDataset(path, 2, 2).recipe == {}
    assert SequenceDataset(path, 2, 2, keys={"obs": "state"}).tensors()["obs"][0] == 100
    with pytest.raises(InvalidInput, match=f"the recipe of .* has {FINGERPRINT}"):
        write_dataset(tmp_path / "e.h5", **COUNTING, recipe={FINGERPRINT: "0"})


def test_training_and_validation_share_no_episode_and_miss_none(tmp_path: Path) -> None:
    path = write_synthetic(tmp_path / "d.zarr", episodes=10, steps=7)
    splits = [SequenceDataset(path, 2, 2, split=one, val_ratio=0.3, seed=5) for one in ("train", "val")]
    assert [one.episode_count for one in splits] == [7, 3]
    rows = [set(map(tuple, one.tensors()["obs"].tolist())) for one in splits]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == 70
    again = SequenceDataset(path, 2, 2, split="val", val_ratio=0.3, seed=5)
    assert torch.equal(again.tensors()["obs"], splits[1].tensors()["obs"])
    other = SequenceDataset(path, 2, 2, split="val", val_ratio=0.3, seed=6)
    assert not torch.equal(other.tensors()["obs"], splits[1].tensors()["obs"])


def test_a_split_never_takes_the_last_episode_of_training(tmp_path: Path) -> None:
    path = write_synthetic(tmp_path / "d.zarr", episodes=1)
    assert SequenceDataset(path, 2, 2, val_ratio=0.9).episode_count == 1
    assert len(SequenceDataset(path, 2, 2, split="val", val_ratio=0.9)) == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_recipe_comes_back(suffix: str, tmp_path: Path) -> None:
    recipe = {"world": "gear", "seed": 3, "noise": 0.1, "nested": {"list": [1, 2]}}
    path = write_dataset(tmp_path / f"d{suffix}", **COUNTING, recipe=recipe)
    assert SequenceDataset(path, 2, 2).recipe == recipe
    with pytest.raises(InvalidInput, match="is no JSON"):
        write_dataset(tmp_path / f"e{suffix}", **COUNTING, recipe={"x": object()})
    assert not (tmp_path / f"e{suffix}").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_there_is_replaced_only_when_asked(suffix: str, tmp_path: Path) -> None:
    path = write_synthetic(tmp_path / f"d{suffix}")
    before = SequenceDataset(path, 2, 2).fingerprint
    with pytest.raises(InvalidInput, match="is there already"):
        write_dataset(path, **COUNTING)
    assert SequenceDataset(path, 2, 2).fingerprint == before
    write_dataset(path, **COUNTING, force=True)
    assert len(SequenceDataset(path, 2, 2)) == 10
    assert [one.name for one in tmp_path.iterdir()] == [f"d{suffix}"]


def test_a_folder_replaces_a_file_and_a_file_a_folder(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("a file")
    (tmp_path / "d.h5").mkdir()
    for name in ("d", "d.h5"):
        assert SequenceDataset(write_dataset(tmp_path / name, **COUNTING, force=True), 2, 2).window_count == 10
    assert sorted(one.name for one in tmp_path.iterdir()) == ["d", "d.h5"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_write_that_fails_leaves_what_was_there(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_synthetic(tmp_path / f"d{suffix}")
    before = SequenceDataset(path, 2, 2).fingerprint
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("pdp.data_files.os.replace", fail)
    with pytest.raises(NoSpace):
        write_dataset(path, **COUNTING, force=True)
    assert SequenceDataset(path, 2, 2).fingerprint == before
    assert [one.name for one in tmp_path.iterdir()] == [f"d{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_data_of_zeros_are_written_and_read(suffix: str, tmp_path: Path) -> None:
    path = write_dataset(tmp_path / f"d{suffix}", numpy.zeros((10, 2)), numpy.zeros((10, 1)), [4, 10])
    assert not SequenceDataset(path, 2, 2).tensors()["obs"].any()


def test_a_zip_reads_as_the_folder_that_it_holds(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path / "d.zarr")
    data, other = SequenceDataset(zipped(folder), 2, 2), SequenceDataset(folder, 2, 2)
    assert (data.fingerprint, data.recipe) == (other.fingerprint, other.recipe)
    with pytest.raises(DatasetError, match="a zip is read, not written"):
        write_dataset(tmp_path / "new.zip", **COUNTING)


def test_reading_changes_nothing(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path / "d.zarr")
    paths = [folder, zipped(folder), write_synthetic(tmp_path / "d.h5")]
    files = [one for path in paths for one in (path, *path.rglob("*")) if one.is_file()]
    before = [(one.read_bytes(), one.stat().st_mtime_ns) for one in files]
    for path in paths:
        SequenceDataset(path, 2, 2)
    assert [(one.read_bytes(), one.stat().st_mtime_ns) for one in files] == before


@pytest.mark.parametrize("place", ["state", "data/state"])
def test_arrays_of_other_names_are_read_when_they_are_given(place: str, tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d.h5", **COUNTING)
    with h5py.File(path, "a") as file:
        file.move("data/obs", place)
    assert SequenceDataset(path, 2, 2, keys={"obs": "state"}).obs_dim == 1
    with pytest.raises(DatasetError, match=r"has no obs \(nor data/obs\)"):
        SequenceDataset(path, 2, 2)
    with pytest.raises(DatasetError, match=r"has no image \(nor data/image\)"):
        SequenceDataset(path, 2, 2, keys={"obs": "image"})
    with pytest.raises(InvalidInput, match="keys has 'reward'; expected some of obs, action, episode_ends"):
        SequenceDataset(path, 2, 2, keys={"reward": "reward"})


def test_attributes_of_others_files_are_a_recipe_as_far_as_json_has_them(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d.h5", **COUNTING)
    with h5py.File(path, "a") as file:
        del file.attrs["recipe"]
        given = {"recipe": "walk 3", "sizes": numpy.array([1, 2]), "by": numpy.bytes_(b"us"), "rate": numpy.float32(2)}
        for key, value in {**given, "nan": numpy.nan, "empty": h5py.Empty("f")}.items():
            file.attrs[key] = value
    assert SequenceDataset(path, 2, 2).recipe == {"recipe": "walk 3", "sizes": [1, 2], "by": "us", "rate": 2.0}


def test_tensors_lists_and_read_only_arrays_are_written_as_others_are(tmp_path: Path) -> None:
    tensors = {name: torch.as_tensor(values) for name, values in COUNTING.items()}
    tensors["obs"].requires_grad_()
    fixed = {name: numpy.array(values) for name, values in COUNTING.items()}
    for one in fixed.values():
        one.flags.writeable = False
    found = {
        SequenceDataset(write_dataset(tmp_path / f"{place}.h5", **given), 2, 2).fingerprint
        for place, given in enumerate((COUNTING, tensors, fixed, {name: one.tolist() for name, one in tensors.items()}))
    }
    assert len(found) == 1


# ---------------------------------------------------------------- broken data sets


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_array_is_named_with_those_that_are_there(suffix: str, tmp_path: Path) -> None:
    path = write_synthetic(tmp_path / f"d{suffix}")
    if suffix == ".h5":
        with h5py.File(path, "a") as file:
            del file["data/action"]
    else:
        shutil.rmtree(path / "data" / "action")
    with pytest.raises(DatasetError, match=r"has no action \(nor data/action\); it has data, data/obs, meta"):
        SequenceDataset(path, 2, 2)


def test_a_chunk_that_is_not_there_is_no_row_of_zeros(tmp_path: Path) -> None:
    path = tmp_path / "d.zarr"
    root = zarr.open_group(str(path), mode="w")
    for name, values in COUNTING.items():
        root.create_array(name, data=numpy.asarray(values), chunks=(2,) if name == "episode_ends" else (2, 1))
    assert len(SequenceDataset(path, 2, 2)) == 10
    (path / "obs" / "c" / "3" / "0").unlink()
    with pytest.raises(DatasetError, match="obs is cut short: 1 of its 5 chunks are not there"):
        SequenceDataset(path, 2, 2)


def test_a_chunk_or_shard_that_a_zip_or_folder_lacks_is_named(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path / "d.zarr")
    with pytest.raises(DatasetError, match="action is cut short: 1 of its 1 chunks are not there"):
        SequenceDataset(zipped(folder, without="data/action/0.0"), 2, 2)
    path = tmp_path / "sharded.zarr"
    root = zarr.open_group(str(path), mode="w")
    for name, values in COUNTING.items():
        array = numpy.asarray(values)
        shape = (1,) if name == "episode_ends" else (2, 1)
        shards = (1,) if name == "episode_ends" else (4, 1)
        made = root.create_array(name, shape=array.shape, dtype=array.dtype, chunks=shape, shards=shards)
        made[...] = array
    assert len(SequenceDataset(path, 2, 2)) == 10
    (path / "action" / "c" / "1" / "0").unlink()
    with pytest.raises(DatasetError, match="action is cut short"):
        SequenceDataset(path, 2, 2)


def test_shards_are_no_chunks_of_blosc_but_are_refused_when_cut(tmp_path: Path) -> None:
    from zarr.codecs import BloscCodec

    path = tmp_path / "d.zarr"
    root = zarr.open_group(str(path), mode="w")
    for name, values in COUNTING.items():
        array = numpy.asarray(values)
        rest = array.shape[1:]
        made = root.create_array(
            name, shape=array.shape, dtype=array.dtype, chunks=(1, *rest), shards=(2, *rest), compressors=[BloscCodec()]
        )
        made[...] = array
    (path / "action" / "notes.txt").write_text("no chunk")
    assert len(SequenceDataset(path, 2, 2)) == 10
    shard = path / "action" / "c" / "1" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DatasetError):
        SequenceDataset(path, 2, 2)


@pytest.mark.parametrize("left", [0, 10, 16, -16])
def test_a_chunk_that_write_dataset_wrote_and_that_is_cut_is_refused(left: int, tmp_path: Path) -> None:
    path = write_synthetic(tmp_path / "d.zarr")
    (path / "data" / "action" / "notes.txt").write_text("no chunk")
    assert SequenceDataset(path, 2, 2)
    chunk = path / "data" / "action" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:left])
    with pytest.raises(DatasetError, match=r"action is cut short: the chunk 0\.0 has"):
        SequenceDataset(path, 2, 2)


@pytest.mark.parametrize("cut", [1, 5, 16, 100])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_compressed_chunk_that_is_cut_is_not_read_as_something_else(
    cut: int, zarr_format: int, tmp_path: Path
) -> None:
    from zarr.codecs import BloscCodec

    path = tmp_path / "d.zarr"
    root = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)  # type: ignore[arg-type]
    codec: Any = BloscCodec() if zarr_format == 3 else numcodecs.Blosc()
    for name, values in synthetic().items():
        root.create_array(name, data=numpy.asarray(values, dtype=float), compressors=[codec])
    root["episode_ends"].attrs["note"] = "whole numbers, as floats"
    with pytest.raises(DatasetError, match="episode_ends holds float64"):
        SequenceDataset(path, 2, 2)
    chunk = max((one for one in (path / "action").rglob("*") if one.is_file()), key=lambda one: one.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[:-cut])
    with pytest.raises(DatasetError, match="action is cut short: the chunk"):
        SequenceDataset(path, 2, 2)


def test_a_torn_chunk_or_file_is_refused(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path / "d.zarr")
    (chunk,) = [path for path in (folder / "data" / "obs").rglob("*") if path.is_file() and path.name[0] != "."]
    chunk.write_bytes(chunk.read_bytes()[:50])
    file = write_synthetic(tmp_path / "d.h5")
    file.write_bytes(file.read_bytes()[:5000])
    text = tmp_path / "text.h5"
    text.write_text("no data")
    (tmp_path / "empty.zarr").mkdir()
    torn = zipped(write_synthetic(tmp_path / "whole.zarr"))
    torn.write_bytes(torn.read_bytes()[:500])
    for path in (folder, file, text, tmp_path / "empty.zarr", torn):
        with pytest.raises(DatasetError, match=path.name):
            SequenceDataset(path, 2, 2)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"episode_ends": [4, 12]}, "is cut short: its last episode ends at row 12, and obs and action have 10 rows"),
        ({"episode_ends": [4, 9]}, "the last episode ends at row 9, and there are 10 rows: 1 belong to no episode"),
        ({"episode_ends": [4, 4, 10]}, r"episode_ends\[1\] is 4; expected ends that ascend"),
        ({"episode_ends": [0, 10]}, r"episode_ends\[0\] is 0"),
        ({"episode_ends": []}, r"episode_ends is of the form \(0,\)"),
        ({"obs": numpy.full((10, 1), 1e300)}, "obs has .* too large for float32, the first at step 0, in 10 steps"),
        ({"action": COUNTING["action"][:9]}, "obs has 10 rows and action 9"),
        ({"obs": numpy.zeros((10, 2, 2))}, r"obs is of the form \(10, 2, 2\); expected \(steps, dim\)"),
        ({"obs": numpy.zeros((10, 0))}, r"obs is of the form \(10, 0\)"),
        (
            {"action": numpy.where(numpy.arange(10) == 7, numpy.nan, 0)[:, None]},
            "action has .* first at step 7, in 1 steps",
        ),
    ],
)
def test_data_that_cannot_be_trained_on_are_named_when_written_and_when_read(
    changed: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=named):
        write_dataset(tmp_path / "written.zarr", **{**COUNTING, **changed})
    assert not (tmp_path / "written.zarr").exists()
    with h5py.File(tmp_path / "read.h5", "w") as file:
        for name, values in {**COUNTING, **changed}.items():
            array = numpy.asarray(values)
            file[name] = array.astype(numpy.int64) if name == "episode_ends" else array
    with pytest.raises(DatasetError, match=named):
        SequenceDataset(tmp_path / "read.h5", 2, 2)


def test_what_holds_no_numbers_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["obs"] = numpy.array([[b"a"]] * 10)
        file["action"] = COUNTING["action"]
        file["episode_ends"] = COUNTING["episode_ends"]
    with pytest.raises(DatasetError, match=r"obs holds \|S1; expected numbers"):
        SequenceDataset(tmp_path / "d.h5", 2, 2)


def test_a_path_that_is_no_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=r"no such data set: .*d\.zarr"):
        SequenceDataset(tmp_path / "d.zarr", 2, 2)
    (tmp_path / "d.npz").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"expected a zarr folder or zip, or an HDF5 file .* found \.npz"):
        SequenceDataset(tmp_path / "d.npz", 2, 2)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"episode_ends": [4.5, 10.0]}, "episode_ends holds float64; expected whole numbers"),
        ({"obs": [["a"]] * 10}, "obs holds <U1; expected numbers"),
        ({"obs": [[1.0], [1.0, 2.0]]}, "obs is no array"),
    ],
)
def test_what_is_no_array_of_numbers_is_not_written(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=named):
        write_dataset(tmp_path / "d.zarr", **{**COUNTING, **changed})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [{"T_obs": 0}, {"T_action": 0}, {"split": "test"}, {"val_ratio": 1.0}, {"val_ratio": -0.1}]
)
def test_arguments_are_checked(arguments: dict[str, Any], tmp_path: Path) -> None:
    path = write_synthetic(tmp_path / "d.zarr")
    with pytest.raises(InvalidInput, match=next(iter(arguments))):
        SequenceDataset(path, **{"T_obs": 2, "T_action": 2, **arguments})


def test_the_synthetic_data_are_smooth_and_can_be_learned() -> None:
    data = synthetic(steps=50)
    obs, action = data["obs"], data["action"]
    inputs = numpy.concatenate([obs[1:50], obs[:49]], axis=1)
    residual = numpy.linalg.lstsq(inputs, action[1:50], rcond=None)[1]
    assert numpy.sqrt(residual / 49).max() < 0.02
    assert json.dumps(data["episode_ends"].tolist()) == "[50, 100, 150, 200]"
