"""Bundles: versions that leave one registry and come into another, on both databases, are the same versions."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from registry import Registry
from registry.catalog.descriptions import descriptions_of
from registry.catalog.versions import resolve
from registry.core.errors import (
    ArtifactNotFound,
    BlobNotFound,
    Corrupt,
    DestinationExists,
    DigestMismatch,
    InvalidInput,
    NotStored,
)
from registry.core.reference import parse_reference
from registry.formats.bundle import open_bundle
from registry.operations.bundled import BundleContents
from registry.operations.reading import blob_bytes
from tests.catalog.fixtures import Catalogs, catalogs
from tests.operations.bundles import files_of, fill, pulled, push_source, shards, values

__all__ = ["catalogs"]

BOTH_WAYS = [("sqlite", "postgresql"), ("postgresql", "sqlite")]


@pytest.fixture
def target(catalogs: Catalogs, tmp_path: Path) -> Iterator[Registry]:
    """A second registry, on SQLite, with nothing in it."""
    with Registry.open(catalogs.registry("sqlite", tmp_path / "target")) as opened:
        yield opened


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filled registry, `registry`, with what was pushed in `artifacts`; it is only to be copied."""
    folder = tmp_path_factory.mktemp("made")
    with Registry.init(folder / "registry") as registry:
        fill(registry, folder / "artifacts")
    return folder


@pytest.fixture
def filled(made: Path, tmp_path: Path) -> Iterator[Registry]:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    with Registry.open(tmp_path / "registry") as opened:
        yield opened


def described(registry: Registry, reference: str) -> dict[str, bytes]:
    with registry._context.reading() as connection:
        digests = descriptions_of(connection, resolve(connection, parse_reference(reference)).id)
    return {role: blob_bytes(registry._context.store.blobs, digest) for role, digest in digests.items()}


def size_of(registry: Registry) -> int:
    blobs = registry._context.store.blobs
    return sum(blobs.size(digest) for digest in blobs.digests())


@pytest.mark.parametrize(("here", "there"), BOTH_WAYS)
@pytest.mark.parametrize("form", ["bundle", "bundle.tar"])
def test_versions_are_the_same_in_the_registry_that_they_come_to(
    catalogs: Catalogs, tmp_path: Path, here: str, there: str, form: str
) -> None:
    with (
        Registry.open(catalogs.registry(here, tmp_path / "source")) as source,
        Registry.open(catalogs.registry(there, tmp_path / "target")) as target,
    ):
        made = fill(source, tmp_path / "artifacts")
        exported = source.export("walk/merged", "walk/run", "walk/shards", to=tmp_path / form)
        assert sorted(one.reference for one in exported.versions) == sorted(made)
        assert {one.reference for one in exported.versions if one.asked} == {
            "walk/merged@1",
            "walk/run@1",
            "walk/shards@1",
        }
        result = target.import_(tmp_path / form)
        assert [(one.source, one.reference, one.created) for one in result.versions] == [
            (one.reference, one.reference, True) for one in exported.versions
        ]
        assert result.registry == source.id
        for reference in made:
            assert values(target, reference) == values(source, reference), reference
            assert pulled(target, reference, tmp_path / "there" / reference) == pulled(
                source, reference, tmp_path / "here" / reference
            )
        names = source.log("walk/merged").names.values()
        assert sorted(target.log("walk/merged").names.values()) == sorted(names)
        weights = [edge.weight for edge in target.log("walk/merged").ancestors if edge.relation == "merged_from"]
        assert sorted(map(float, filter(None, weights))) == [0.25, 0.75]
        again = target.load("walk/run", component="optimizer")
        assert again["betas"] == (0.9, 0.99)
        assert torch.equal(again["state"]["step"], torch.arange(3.0))
        # The checkpoint shares the base's large tensor there as well.
        assert size_of(target) <= size_of(source) + 40_000


def test_the_same_export_gives_the_same_bytes(filled: Registry, tmp_path: Path) -> None:
    for form in ("one.tar", "two.tar", "one", "two"):
        filled.export("walk/merged", "walk/run", to=tmp_path / form)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    with tarfile.open(tmp_path / "one.tar") as tar:
        members = tar.getmembers()
        assert {one.name: tar.extractfile(one).read() for one in members} == files_of(tmp_path / "one")
    assert [one.name for one in members] == sorted(one.name for one in members)
    assert {(one.mtime, one.uid, one.gid, one.mode, one.uname) for one in members} == {(0, 0, 0, 0o644, "")}


def test_an_import_changes_nothing_the_second_time(filled: Registry, target: Registry, tmp_path: Path) -> None:
    filled.export("walk/perturb", to=tmp_path / "b.tar")
    first = target.import_(tmp_path / "b.tar")
    events = target.events("walk/perturb")
    size = size_of(target)
    second = target.import_(tmp_path / "b.tar")
    assert [one.reference for one in second.versions] == [one.reference for one in first.versions]
    assert not any(one.created or one.bytes_new for one in second.versions)
    assert (second.tags, second.notes) == ((), ())
    assert target.events("walk/perturb") == events
    assert size_of(target) == size


def test_numbers_are_given_anew_and_what_is_there_is_used(filled: Registry, target: Registry, tmp_path: Path) -> None:
    target.push({"other": torch.ones(3)}, "walk/perturb:prod")
    target.push(tmp_path / "artifacts" / "base.safetensors", "walk/base")
    filled.export("walk/perturb@2", to=tmp_path / "b.tar")
    result = target.import_(tmp_path / "b.tar")
    assert [(one.source, one.reference, one.created) for one in result.versions] == [
        ("walk/base@1", "walk/base@1", False),
        ("walk/perturb@1", "walk/perturb@2", True),
        ("walk/perturb@2", "walk/perturb@3", True),
    ]
    assert target.get("walk/perturb@3").base == "walk/base@1"
    assert sorted(target.log("walk/perturb@3").names.values()) == ["walk/base@1", "walk/perturb@2", "walk/perturb@3"]


def test_another_name_is_for_what_was_asked_for(filled: Registry, target: Registry, tmp_path: Path) -> None:
    filled.export("walk/perturb", to=tmp_path / "b")
    result = target.import_(tmp_path / "b", name="ada/walker")
    assert [one.reference for one in result.versions] == [
        "walk/base@1",
        "ada/walker@1",
        "ada/walker@2",
        "ada/walker@3",
    ]
    assert "ada/walker:prod" in result.tags
    filled.export("walk/merged", "walk/run", to=tmp_path / "c")
    with pytest.raises(InvalidInput, match=r"made for walk/merged, walk/run; --as can rename one name alone"):
        target.import_(tmp_path / "c", name="ada/walker")


def test_tags_that_are_there_stay_where_they_are(filled: Registry, target: Registry, tmp_path: Path) -> None:
    target.push({"other": torch.ones(3)}, "walk/perturb:prod")
    filled.export("walk/perturb", to=tmp_path / "b")
    result = target.import_(tmp_path / "b")
    assert result.tags == ("walk/base:v1", "walk/perturb:newest")
    assert result.notes == ("the tag walk/perturb:prod stays at @1; in the bundle it is at walk/perturb@4",)
    assert target.get("walk/perturb:prod").version == 1
    assert target.get("walk/perturb:newest").version == 4
    (moved,) = target.tag_history("walk/perturb", "newest")
    assert moved.payload["why"] == f"imported from walk/perturb@3 of registry {filled.id}"


def test_the_journal_comes_along_as_the_history(filled: Registry, target: Registry, tmp_path: Path) -> None:
    filled.export("walk/perturb", to=tmp_path / "b")
    target.import_(tmp_path / "b")
    journal = filled._context.store.journal
    events = [event for event in filled.events("walk/perturb") if event.version == 3]
    documents = [journal.read("walk", "perturb", event.seq) for event in events]
    assert described(target, "walk/perturb@3") == {"history": b"[" + b",".join(documents) + b"]"}
    pushed = target.events("walk/perturb")[0].payload
    assert (pushed["origin"]["registry"], pushed["origin"]["version"]) == (filled.id, "walk/perturb@1")
    for name in ("walk/perturb", "walk/run"):
        assert ("described", {"history"}) not in [(one.kind, set(one.payload)) for one in filled.events(name)]


def test_a_history_goes_on_when_a_version_moves_again(
    filled: Registry, target: Registry, catalogs: Catalogs, tmp_path: Path
) -> None:
    filled.export("walk/run", to=tmp_path / "b")
    target.import_(tmp_path / "b")
    target.annotate("walk/run", metadata={"seen": "there"})
    target.export("walk/run", to=tmp_path / "c")
    with Registry.open(catalogs.registry("postgresql", tmp_path / "third")) as third:
        third.import_(tmp_path / "c")
        found = described(third, "walk/run")
        assert found["probe"] == b"seen"
        registries = [event["registry"] for event in json.loads(found["history"])]
        assert registries == [filled.id] * registries.count(filled.id) + [target.id] * registries.count(target.id)
        assert third.get("walk/run").metadata == {"epoch": 3, "seen": "there"}
        assert values(third, "walk/run") == values(target, "walk/run")


def test_without_its_base_a_bundle_records_it(filled: Registry, target: Registry, tmp_path: Path) -> None:
    whole = filled.export("walk/merged", to=tmp_path / "whole.tar")
    small = filled.export("walk/merged", to=tmp_path / "small.tar", no_base=True)
    assert [one.reference for one in small.versions if one.external] == ["walk/base@1"]
    assert whole.bytes - small.bytes > 800_000
    result = target.import_(tmp_path / "small.tar")
    assert [one.external for one in result.versions] == [True, False, False, False, False]
    with pytest.raises(NotStored, match=r"walk/base@1 is recorded without its bytes"):
        target.pull("walk/base", tmp_path / "out")
    pulled(target, "walk/merged", tmp_path / "merged")
    there, here = target.show("walk/base"), filled.show("walk/base")
    assert there.contents.components["model"].tensors == here.contents.components["model"].tensors
    assert not any(one.created for one in target.import_(tmp_path / "small.tar").versions)

    # Pushed for real it is the same version, whose bytes are there from now on.
    pushed = target.push(tmp_path / "artifacts" / "base.safetensors", "walk/base")
    assert (pushed.created, pushed.version) == (False, 1)
    assert list(pulled(target, "walk/base", tmp_path / "base")) == ["base.safetensors"]
    assert not target.import_(tmp_path / "small.tar").versions[0].external
    assert not target.export("walk/merged", to=tmp_path / "again").versions[0].external


def test_a_bundle_with_the_base_brings_the_bytes_of_one_that_was_recorded(
    filled: Registry, target: Registry, tmp_path: Path
) -> None:
    filled.export("walk/perturb", to=tmp_path / "small", no_base=True)
    filled.export("walk/perturb", to=tmp_path / "whole")
    target.import_(tmp_path / "small")
    again = target.export("walk/perturb", to=tmp_path / "again")
    assert again.versions[0].external  # a base without bytes goes on without them
    result = target.import_(tmp_path / "whole")
    assert (result.versions[0].created, result.versions[0].external) == (False, False)
    assert result.versions[0].bytes_new > 800_000
    pulled(target, "walk/base", tmp_path / "base")


def test_shards_of_a_base_can_be_left_out_as_well(registry: Registry, target: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    folder.mkdir()
    tensors = {f"w{place}": torch.randn(30, 40) for place in range(4)}
    (folder / "first.safetensors").write_bytes(save({"w0": tensors["w0"], "w1": tensors["w1"]}))
    registry.push(folder / "first.safetensors", "walk/first")  # so that a shard is stored as a header
    push_source(registry, shards(folder, tensors), "walk/shards")
    registry.push({"w0.lora_A.weight": torch.ones(2, 2)}, "walk/small", base="walk/shards", force=True)
    registry.export("walk/small", to=tmp_path / "b", no_base=True)
    target.import_(tmp_path / "b")
    assert target.show("walk/shards").contents.external
    assert push_source(target, shards(folder, tensors), "walk/shards") == "walk/shards@1"
    assert pulled(target, "walk/shards", tmp_path / "there") == pulled(registry, "walk/shards", tmp_path / "here")


def test_what_cannot_be_left_out_is_said(filled: Registry, tmp_path: Path) -> None:
    filled.push({"w": torch.ones(2)}, "walk/child", base="walk/run")
    with pytest.raises(NotStored, match=r"run.ckpt of walk/run@1 is no safetensors file.*without --no-base"):
        filled.export("walk/child", to=tmp_path / "b", no_base=True)
    filled.push(tmp_path / "artifacts" / "base.safetensors", "walk/elsewhere", external=True)
    assert not (tmp_path / "b").exists()


def test_an_external_version_cannot_be_asked_for(registry: Registry, target: Registry, tmp_path: Path) -> None:
    (tmp_path / "base.safetensors").write_bytes(save({"w": torch.ones(50, 50)}))
    registry.push(tmp_path / "base.safetensors", "walk/base", external=True)
    with pytest.raises(NotStored, match=r"walk/base@1 is recorded without its bytes"):
        registry.export("walk/base", to=tmp_path / "b")
    registry.push({"w.lora_A.weight": torch.ones(2, 2)}, "walk/small", base="walk/base", force=True)
    assert [one.external for one in registry.export("walk/small", to=tmp_path / "b").versions] == [True, False]
    assert [one.external for one in target.import_(tmp_path / "b").versions] == [True, False]
    origin = target.events("walk/base")[0].payload["origin"]
    assert origin["path"] == str(tmp_path / "base.safetensors")


def test_a_destination_that_is_there_is_kept(filled: Registry, tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_text("mine")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("mine")
    for place in ("b", "b.tar"):
        with pytest.raises(DestinationExists):
            filled.export("walk/perturb", to=tmp_path / place)
    assert (tmp_path / "b.tar").read_text() == "mine"
    filled.export("walk/perturb", to=tmp_path / "b.tar", force=True)
    (tmp_path / "empty").mkdir()
    filled.export("walk/perturb", to=tmp_path / "empty")
    with open_bundle(tmp_path / "empty") as one, open_bundle(tmp_path / "b.tar") as other:
        assert one.members == other.members
        BundleContents(one).prove()


@pytest.mark.parametrize("form", ["b", "b.tar"])
def test_a_damaged_store_gives_no_bundle(filled: Registry, tmp_path: Path, form: str) -> None:
    blobs = filled._context.store.blobs
    places = {digest for digest, _ in filled.show("walk/perturb@1").contents.blobs}
    largest = max(places, key=blobs.size)
    path = blobs.local_path(largest)
    data = path.read_bytes()
    before = sorted(tmp_path.iterdir())
    path.chmod(0o644)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DigestMismatch, match=largest):
        filled.export("walk/perturb", to=tmp_path / form)
    path.write_bytes(data[:-9])
    with pytest.raises(Corrupt, match=largest):
        filled.export("walk/perturb", to=tmp_path / form)
    path.unlink()
    with pytest.raises(BlobNotFound, match=largest):
        filled.export("walk/perturb", to=tmp_path / form)
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_exported_of_what_is_not_there(filled: Registry, tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFound):
        filled.export("walk/nothing", to=tmp_path / "b")
    with pytest.raises(InvalidInput, match="nothing to export"):
        filled.export(to=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_long_names_and_a_version_of_two_names_pass(registry: Registry, target: Registry, tmp_path: Path) -> None:
    name = f"{'n' * 128}/{'m' * 128}"
    registry.push({"w": torch.ones(2)}, name)
    registry.push({"w": torch.ones(2)}, "walk/same")
    registry.export(name, "walk/same", to=tmp_path / "b.tar")
    assert [one.reference for one in target.import_(tmp_path / "b.tar").versions] == [f"{name}@1", "walk/same@1"]
    with tarfile.open(tmp_path / "b.tar") as tar:
        assert f"events/{name}/1.json" in tar.getnames()
