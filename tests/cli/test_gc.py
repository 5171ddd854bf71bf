from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_gc_tells_what_went_and_who_needed_it(run: Run, here: Path) -> None:
    run("rm", "walk/perturb@3")
    assert run("gc").out == "walk/perturb@3 waits for the end of the grace period\nnothing to free\n"
    planned = run("gc", "--grace", "0s", "--dry-run")
    done = run("gc", "--grace", "0s")
    assert (planned.code, done.code, done.err) == (0, 0, "")
    lines = done.out.splitlines()
    assert lines[0] == "Deleted"
    assert re.fullmatch(r"BLOB +SIZE +AS +NEEDED BY", lines[1])
    assert re.fullmatch(r"[0-9a-f]{12} +[0-9.]+ K?i?B  tensors  walk/perturb@3", lines[2])
    assert lines[-2] == "purged walk/perturb@3"
    assert re.fullmatch(r"freed [0-9.]+ K?i?B in \d blobs?", lines[-1])
    assert planned.out == done.out.replace("Deleted", "Would be deleted").replace("purged", "would purge").replace(
        "freed", "would free"
    )
    assert run("gc", "--grace", "0s").out == "nothing to free\n"
    assert run("restore", "walk/perturb@3").error == (
        "walk/perturb@3 was removed, and gc took its bytes; push it again"
    )


def test_json_of_gc_is_one_document(run: Run, here: Path) -> None:
    run("rm", "walk/perturb@3")
    document = run("gc", "--grace", "0s", "--json").json
    assert list(document) == [
        *("dry_run", "grace_seconds", "bytes_freed", "purged", "waiting", "deleted", "kept", "orphans", "temporaries")
    ]
    assert document["purged"] == ["walk/perturb@3"]
    assert document["bytes_freed"] == sum(one["size"] for one in document["deleted"])
    assert {"digest", "size", "roles", "held_by"} == set(document["deleted"][0])
    assert run("gc", "--json").json["grace_seconds"] == 7 * 24 * 3600


@pytest.mark.parametrize("grace", ["", "7", "d", "-1d", "1.5h", "7 d", "7y", "9999999d"])
def test_a_duration_is_a_number_with_its_unit(run: Run, here: Path, grace: str) -> None:
    ran = run("gc", "--grace", grace)
    assert (ran.code, ran.out) == (2, "")
    assert "expected a number with s, m, h, d or w" in ran.err


@pytest.mark.parametrize(("grace", "seconds"), [("90s", 90), ("15m", 900), ("12h", 43200), ("2w", 1209600)])
def test_every_unit_counts(run: Run, here: Path, grace: str, seconds: int) -> None:
    assert run("gc", "--grace", grace, "--json").json["grace_seconds"] == seconds


def test_a_grace_period_before_all_time_is_refused(run: Run, here: Path) -> None:
    assert run("gc", "--grace", "999999w").code == 3
