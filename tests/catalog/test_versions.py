"""From a reference to a version."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry import Registry
from registry.catalog.tables import version
from registry.core.errors import ArtifactNotFound, InvalidReference, TagNotFound, VersionNotFound
from tests.catalog.artifacts import peft_folder, tensor_file

NAME = "team/walk"


@pytest.fixture
def three(registry: Registry, tmp_path: Path) -> Registry:
    """Three versions; the tag `prod` is on the second."""
    for value in range(1, 4):
        registry.push(tensor_file(tmp_path, value), NAME, tags=["prod"] if value == 2 else [])
    return registry


def remove(registry: Registry, number: int) -> None:
    with registry._context.database.writing() as connection:
        connection.execute(version.update().where(version.c.number == number).values(state="removed"))


def give_digests(registry: Registry, *digests: str) -> None:
    with registry._context.database.writing() as connection:
        for number, digest in enumerate(digests, 1):
            padded = digest.ljust(64, "5")
            connection.execute(version.update().where(version.c.number == number).values(manifest_digest=padded))


def test_a_reference_names_one_version(three: Registry) -> None:
    for reference, number in {"": 3, ":latest": 3, ":prod": 2, "@1": 1, "@3": 3}.items():
        assert three.resolve(NAME + reference) == f"{NAME}@{number}"
        assert three.resolve(f"registry://{NAME}{reference}") == f"{NAME}@{number}"


def test_every_unique_prefix_of_a_digest_names_its_version(three: Registry) -> None:
    digests = {number: three.get(f"{NAME}@{number}").digest for number in (1, 2, 3)}
    for number, digest in digests.items():
        for length in (*range(8, 16), 63, 64):
            assert three.resolve(f"{NAME}@sha256:{digest[:length]}") == f"{NAME}@{number}"


def test_a_prefix_that_fits_several_is_refused_and_says_which(three: Registry) -> None:
    give_digests(three, "abcd0", "abcdf", "abcefff")
    with pytest.raises(InvalidReference, match="ambiguous: it fits @1, @2; give more digits"):
        three.resolve(f"{NAME}@sha256:abcd")
    assert three.resolve(f"{NAME}@sha256:abcd0") == f"{NAME}@1"
    assert three.resolve(f"{NAME}@sha256:abcdf") == f"{NAME}@2"
    assert three.resolve(f"{NAME}@sha256:abce") == f"{NAME}@3"
    with pytest.raises(VersionNotFound, match="has this digest"):
        three.resolve(f"{NAME}@sha256:abcde")


def test_the_first_and_the_last_digest_are_found(three: Registry) -> None:
    give_digests(three, "0" * 64, "f" * 64, "7" * 64)
    assert three.resolve(f"{NAME}@sha256:0000") == f"{NAME}@1"
    assert three.resolve(f"{NAME}@sha256:ffff") == f"{NAME}@2"


def test_a_number_that_is_not_there_is_not_found_whatever_its_size(three: Registry) -> None:
    for number in (4, 2**31 - 1, 2**31, 2**53, 10**17):
        with pytest.raises(VersionNotFound, match=f"@{number}: no such version; the highest number of {NAME} is 3"):
            three.resolve(f"{NAME}@{number}")


def test_an_unknown_name_offers_the_nearest(three: Registry) -> None:
    with pytest.raises(ArtifactNotFound, match=r"no artifact team/wakl; did you mean team/walk\?"):
        three.resolve("team/wakl")
    with pytest.raises(ArtifactNotFound, match="registry list"):
        three.resolve("zzz/qqq@1")


def test_an_unknown_tag_lists_those_there_are(three: Registry) -> None:
    with pytest.raises(TagNotFound, match=f"no such tag; {NAME} has prod, latest"):
        three.resolve(f"{NAME}:best")


def test_a_removed_version_is_named_by_nothing(three: Registry) -> None:
    digest = three.get(f"{NAME}@3").digest
    remove(three, 3)
    assert three.resolve(NAME) == f"{NAME}@2"
    with pytest.raises(VersionNotFound):
        three.resolve(f"{NAME}@3")
    with pytest.raises(VersionNotFound):
        three.resolve(f"{NAME}@sha256:{digest}")
    remove(three, 2)
    with pytest.raises(VersionNotFound, match=f"points to {NAME}@2, which was removed"):
        three.resolve(f"{NAME}:prod")
    with pytest.raises(VersionNotFound, match=f"points to {NAME}@2, which was removed"):
        three.resolve(f"{NAME}:prod@{{2999-01-01}}")
    assert [found.version for found in three.find()] == [1]
    assert [found.version for found in three.find("tag = latest")] == [1]


def test_one_content_in_two_names_is_two_versions(registry: Registry, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "adapter", 1.0)
    first = registry.push(folder, "team/one")
    second = registry.push(folder, "team/two")
    assert first.digest == second.digest
    assert second.created
    assert second.bytes_new == 0
    assert registry.resolve(f"team/two@sha256:{first.digest}") == "team/two@1"
