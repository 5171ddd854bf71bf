"""`registry fsck` and `registry reindex`."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run


def blob(root: Path) -> Path:
    """The largest blob: the tensors of walk/perturb@3 alone."""
    return max(root.glob("blobs/sha256/*/*"), key=lambda path: path.stat().st_size)


def test_a_whole_registry_is_one_line(run: Run, here: Path) -> None:
    ran = run("fsck")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("whole: 2 names, 4 versions, ")
    assert run("fsck", "--deep").out.rstrip().endswith("read")


def test_problems_are_told_with_who_suffers_and_the_mend(run: Run, here: Path, tmp_path: Path) -> None:
    gone = blob(tmp_path / "registry")
    size = gone.stat().st_size
    gone.unlink()
    ran = run("fsck")
    assert ran.code == 1
    assert ran.out.splitlines() == [
        f"blob {gone.name}",
        f"  expected {size} bytes",
        "  found    no such blob",
        "  suffers  walk/perturb@3",
        f"  mend     put it back from a copy of the store: blobs/sha256/{gone.name[:2]}",
        ran.out.splitlines()[-1],
    ]
    assert ran.out.splitlines()[-1].startswith("1 problem: 2 names, 4 versions")
    told = run("fsck", "--json")
    assert told.code == 1
    assert told.json["whole"] is False
    assert told.json["problems"] == [
        {
            "kind": "blob",
            "subject": gone.name,
            "expected": f"{size} bytes",
            "found": "no such blob",
            "versions": ["walk/perturb@3"],
            "mend": f"put it back from a copy of the store: blobs/sha256/{gone.name[:2]}",
        }
    ]


def test_a_lost_catalog_is_made_again(run: Run, here: Path, tmp_path: Path) -> None:
    before = [run(*words).json for words in (("list", "--json"), ("show", "walk/perturb:prod", "--json"))]
    (tmp_path / "registry" / "catalog.sqlite").unlink()
    ran = run("list")
    assert (ran.code, "registry reindex" in ran.error) == (6, True)
    assert run("fsck").code == 1
    ran = run("reindex")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("made the catalog again: 2 names, 4 versions, ")
    assert [run(*words).json for words in (("list", "--json"), ("show", "walk/perturb:prod", "--json"))] == before
    assert run("fsck", "--deep").code == 0
    assert run("reindex", "--json").json["left_out"] == []


def test_a_damaged_catalog_is_kept_and_said_to_be(run: Run, here: Path, tmp_path: Path) -> None:
    (tmp_path / "registry" / "catalog.sqlite").write_bytes(b"no database at all, but quite long" * 100)
    ran = run("reindex")
    assert ran.code == 0
    assert "the damaged catalog is kept as" in ran.err


def test_what_cannot_be_followed_is_refused_or_left_out(run: Run, here: Path, tmp_path: Path) -> None:
    (tmp_path / "registry" / "journal" / "walk" / "perturb" / "2.json").unlink()
    ran = run("reindex")
    assert (ran.code, "walk/perturb ends before its event 2" in ran.error) == (6, True)
    ran = run("reindex", "--skip-damaged")
    assert ran.code == 0
    assert ran.err.startswith("left out: walk/perturb ends before its event 2: journal/walk/perturb/2.json is missing")
    assert run("reindex", "--skip-damaged", "--json").json["left_out"][0]["name"] == "walk/perturb"


def test_without_a_registry_both_say_where_they_looked(run: Run, nowhere: Path) -> None:
    for words in (["fsck"], ["reindex"]):
        ran = run(*words)
        assert ran.code == 4
        assert "make one with 'registry init'" in ran.error
    assert list(nowhere.iterdir()) == []
