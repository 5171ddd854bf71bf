"""Eight processes that push at once: numbers and journals without gaps, no process waits for ever for another."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from registry import Registry
from registry.catalog.journal_rows import has_pending
from tests.catalog import workers
from tests.catalog.artifacts import peft_folder, tensor_file

PROCESSES = 8
PUSHES = 10


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Made once for all tests here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([workers.__name__])
    start = context.Barrier(PROCESSES)
    with ProcessPoolExecutor(PROCESSES, context, initializer=workers.prepare, initargs=(start,)) as pool:
        yield pool


def complete(registry: Registry, name: str) -> int:
    """Checks that a name's events have numbers without gaps, times in order, and all their journal objects."""
    events = registry.events(name)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    times = [event.at for event in events]
    assert times == sorted(times)
    store = registry._context.store
    assert store.journal.sequence(*name.split("/")) == [event.seq for event in events]
    for event in events:
        assert store.journal.read(event.namespace, event.name, event.seq) == event.document(registry.id)
    with registry._context.reading() as connection:
        assert not has_pending(connection)
    return len(events)


def test_numbers_have_no_gaps_when_eight_processes_push_to_one_name(
    registry: Registry, registry_url: str, processes: ProcessPoolExecutor, tmp_path: Path
) -> None:
    files = [tensor_file(tmp_path / "files", value) for value in range(PROCESSES * PUSHES)]
    jobs = [
        processes.submit(workers.push_each, registry_url, "team/walk", files[one::PROCESSES], "newest")
        for one in range(PROCESSES)
    ]
    numbers = [job.result(timeout=120) for job in jobs]

    assert sorted(number for given in numbers for number in given) == list(range(1, PROCESSES * PUSHES + 1))
    assert all(given == sorted(given) for given in numbers)
    found = registry.find(order_by="version")
    assert [version.version for version in found] == list(range(1, PROCESSES * PUSHES + 1))
    assert {version.metadata["file"] for version in found} == {file.name for file in files}
    for worker, given in enumerate(numbers):
        assert [found[number - 1].metadata["file"] for number in given] == [f.name for f in files[worker::PROCESSES]]
    # A push, what describes it, its metadata, and the tag, which moves at each.
    assert complete(registry, "team/walk") == 4 * PROCESSES * PUSHES
    moves = [event for event in registry.events("team/walk") if event.kind == "tag_moved"]
    assert [move.payload["from"] for move in moves] == [None, *range(1, PROCESSES * PUSHES)]
    assert registry.get("team/walk:newest").version == registry.get("team/walk").version == PROCESSES * PUSHES


def test_pushes_that_share_layouts_blobs_and_configs_do_not_wait_in_a_ring(
    registry: Registry, registry_url: str, processes: ProcessPoolExecutor, tmp_path: Path
) -> None:
    # Four tensor files and four configurations in every combination: any two of the folders that are pushed at the same
    # time share some rows and not others.
    folders = [
        peft_folder(tmp_path / f"{value}-{dropout}", value, r=2 + value % 2, lora_dropout=dropout / 10)
        for value in range(4)
        for dropout in range(4)
    ]
    jobs = []
    for one in range(PROCESSES):
        turned = folders[2 * one :] + folders[: 2 * one]
        ordered = turned if one % 2 else turned[::-1]
        jobs.append(processes.submit(workers.push_each, registry_url, f"team/name-{one}", ordered, None))
    for job in jobs:
        assert job.result(timeout=120) == list(range(1, len(folders) + 1))

    assert len({version.digest for version in registry.find()}) == len(folders)
    with registry._context.reading() as connection:
        from sqlalchemy import Table, func, select

        from registry.catalog import tables

        def count(table: Table) -> int:
            return connection.execute(select(func.count()).select_from(table)).scalar_one()

        assert count(tables.layout) == 2
        assert count(tables.target) == 2
        assert count(tables.lora_config) == 8
        # Tensors, configurations, layout documents and manifests.
        assert count(tables.blob) == 4 + 8 + 2 + len(folders)
    for one in range(PROCESSES):
        assert complete(registry, f"team/name-{one}") == 2 * len(folders)


def test_the_same_artifact_pushed_by_eight_processes_is_one_version(
    registry: Registry, registry_url: str, processes: ProcessPoolExecutor, tmp_path: Path
) -> None:
    folder = peft_folder(tmp_path / "adapter", 1.0)
    jobs = [
        processes.submit(workers.push_each, registry_url, "team/same", [folder] * 3, "prod") for _ in range(PROCESSES)
    ]
    assert [job.result(timeout=120) for job in jobs] == [[1, 1, 1]] * PROCESSES
    # One push, its metadata and its tag; the others said nothing new.
    assert complete(registry, "team/same") == 3
