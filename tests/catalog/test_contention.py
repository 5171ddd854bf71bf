"""A transaction that the database ends for another writer's sake is done again, by whoever ran it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from registry import Registry
from registry.core.errors import Contended
from registry.operations.context import TRIES, until_done
from tests.catalog.artifacts import tensor_file
from tests.catalog.fixtures import Catalogs


def test_two_that_lock_two_names_in_two_orders_both_end_on_postgresql(catalogs: Catalogs, tmp_path: Path) -> None:
    """SQLite has one writer at a time, so there nobody can be in such a ring."""
    with Registry.open(catalogs.registry("postgresql", tmp_path / "registry")) as registry:
        for name in ("one", "two"):
            registry.push(tensor_file(tmp_path / name, 1.0), f"team/{name}")
        context = registry._context
        met = threading.Barrier(2)
        tries = dict.fromkeys(("one", "two"), 0)

        def lock_both(first: str, second: str) -> None:
            def once() -> None:
                tries[first] += 1
                with context.writing() as connection:
                    context.lock(connection, "team", first)
                    if tries[first] == 1:
                        met.wait(timeout=60)
                    context.lock(connection, "team", second)

            until_done(once)

        threads = [threading.Thread(target=lock_both, args=order) for order in (("one", "two"), ("two", "one"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert sorted(tries.values()) == [1, 2]


def test_one_that_is_always_in_the_way_is_told() -> None:
    tries = []

    def once() -> None:
        tries.append(1)
        raise Contended("deadlock detected")

    with pytest.raises(Contended):
        until_done(once)
    assert len(tries) == TRIES
