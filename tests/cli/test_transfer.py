from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run


def test_an_export_and_an_import_say_what_they_did(run: Run, here: Path) -> None:
    ran = run("export", "walk/perturb:prod", "--to", "b.tar")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("exported 3 versions to b.tar  (")
    assert lines[1:] == ["  walk/base@1  came along", "  walk/perturb@1  came along", "  walk/perturb@2"]
    assert run("init", "other").code == 0
    ran = run("import", "b.tar", "--registry", "other", "--as", "ada/walker")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("imported 3 versions from b.tar, 3 new  (")
    assert lines[1:] == [
        "  walk/base@1 -> walk/base@1",
        "  walk/perturb@1 -> ada/walker@1",
        "  walk/perturb@2 -> ada/walker@2",
        "  tags: walk/base:v1, ada/walker:prod",
    ]
    ran = run("import", "b.tar", "--registry", "other", "--as", "ada/walker")
    assert ran.out.splitlines()[1:] == [
        "  walk/base@1 -> walk/base@1  already there",
        "  walk/perturb@1 -> ada/walker@1  already there",
        "  walk/perturb@2 -> ada/walker@2  already there",
    ]


def test_a_bundle_without_its_base_says_so(run: Run, here: Path) -> None:
    out = run("export", "walk/perturb", "--to", "b", "--no-base").out
    assert "  walk/base@1  came along, without its tensors\n" in out
    run("init", "other")
    assert "walk/base@1 -> walk/base@1  without its tensors\n" in run("import", "b", "--registry", "other").out
    ran = run("pull", "walk/base", "x", "--registry", "other")
    assert (ran.code, "recorded without its bytes" in ran.error) == (4, True)


def test_json_of_an_export_and_an_import(run: Run, here: Path) -> None:
    digest = run("show", "walk/base", "--json").json["digest"]
    document = run("export", "walk/base", "--to", "b", "--json").json
    size = sum(path.stat().st_size for path in (here / "b").rglob("*") if path.is_file())
    assert document == {
        "path": "b",
        "bytes": size,
        "blobs": 4,
        "versions": [{"reference": "walk/base@1", "digest": digest, "asked": True, "external": False}],
    }
    run("init", "other")
    imported = run("import", "b", "--registry", "other", "--json").json
    assert imported["tags"] == ["walk/base:v1"]
    assert imported["notes"] == []
    (version,) = imported["versions"]
    assert version.pop("bytes_new") > 0
    assert version == {
        "source": "walk/base@1",
        "reference": "walk/base@1",
        "digest": digest,
        "asked": True,
        "created": True,
        "external": False,
    }
    history = run("show", "walk/base", "--registry", "other", "--json").json["history"]
    assert "described" in {note["kind"] for note in history["notes"]}


def test_a_tag_that_stays_is_a_note(run: Run, here: Path) -> None:
    run("export", "walk/perturb", "--to", "b.tar")
    run("tag", "walk/perturb@1", "prod")
    ran = run("import", "b.tar")
    assert ran.code == 0
    assert ran.err == "note: the tag walk/perturb:prod stays at @1; in the bundle it is at walk/perturb@2\n"


def test_refusals_are_one_line_and_leave_nothing(run: Run, here: Path) -> None:
    (here / "b.tar").write_text("mine")
    ran = run("export", "walk/base", "--to", "b.tar")
    assert (ran.code, "--force to replace it" in ran.error) == (5, True)
    ran = run("export", "walk/nothing", "--to", "c.tar")
    assert (ran.code, "no artifact walk/nothing" in ran.error) == (4, True)
    ran = run("import", "b.tar")
    assert (ran.code, "truncated" in ran.error) == (6, True)
    ran = run("import", "nothing.tar")
    assert (ran.code, "no such file or folder" in ran.error) == (4, True)
    ran = run("import", "b.tar", "--as", "x")
    assert (ran.code, "expected namespace/name" in ran.error) == (3, True)
    assert run("export", "--to", "c.tar").code == 2
    assert run("export", "walk/base").code == 2
    assert [path.name for path in here.iterdir()] == ["b.tar"]
    assert run("export", "walk/base", "--to", "b.tar", "--force").code == 0
