"""What every `Journal` must do. A further implementation is one more entry of IMPLEMENTATIONS."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from registry.core.errors import Corrupt, InvalidReference, NotFound
from registry.store import create_store, open_store
from registry.store.interface import Journal, Store

IMPLEMENTATIONS: dict[str, tuple[Callable[[Path], Store], Callable[[Path], Store]]] = {
    "local": (lambda folder: create_store(folder / "store", uuid4().hex), lambda folder: open_store(folder / "store")),
}

MALFORMED = {
    "empty": "",
    "parent": "..",
    "parent inside": "a..b",
    "dot": ".",
    "hidden": ".a",
    "path": "a/b",
    "absolute": "/etc",
    "backslash": "a\\b",
    "upper case": "A",
    "NUL": "a\0",
    "line feed": "a\n",
    "option": "-a",
    "not ASCII": "é",
    "long": "a" * 300,
}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def journal(implementation: str, tmp_path: Path) -> Journal:
    return IMPLEMENTATIONS[implementation][0](tmp_path).journal


class TestAnEntry:
    @pytest.mark.parametrize("document", [b"", b'{"event":"pushed"}', bytes(range(256)) * 8192])
    def test_is_read_back_as_it_was_appended(self, journal: Journal, document: bytes) -> None:
        journal.append("walk", "perturb", 1, document)
        assert journal.read("walk", "perturb", 1) == document

    def test_may_be_appended_again_with_the_same_bytes(self, journal: Journal) -> None:
        for _ in range(3):
            journal.append("walk", "perturb", 1, b"same")
        assert journal.read("walk", "perturb", 1) == b"same"
        assert journal.sequence("walk", "perturb") == [1]

    @pytest.mark.parametrize("other", [b"other", b"", b"firs", b"first "])
    def test_is_never_replaced(self, journal: Journal, other: bytes) -> None:
        journal.append("walk", "perturb", 1, b"first")
        with pytest.raises(Corrupt, match="another document"):
            journal.append("walk", "perturb", 1, other)
        assert journal.read("walk", "perturb", 1) == b"first"

    def test_has_one_winner_among_many_writers(self, journal: Journal) -> None:
        start = threading.Barrier(8)
        refused: list[int] = []
        failures = []

        def work(number: int) -> None:
            try:
                start.wait()
                for seq in range(10):
                    try:
                        journal.append("walk", "perturb", seq, b"writer %d" % number)
                    except Corrupt:
                        refused.append(seq)
            except BaseException as error:  # noqa: BLE001 (shown by the assertion below)
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert sorted(refused) == sorted(list(range(10)) * 7)
        assert all(journal.read("walk", "perturb", seq).startswith(b"writer ") for seq in range(10))

    def test_that_nobody_appended_is_not_found(self, journal: Journal) -> None:
        journal.append("walk", "perturb", 1, b"{}")
        for namespace, name, seq in (("walk", "perturb", 2), ("walk", "carry", 1), ("run", "perturb", 1)):
            with pytest.raises(NotFound, match=f"{namespace}/{name}"):
                journal.read(namespace, name, seq)

    def test_is_there_when_the_store_is_opened_again(
        self, implementation: str, tmp_path: Path, journal: Journal
    ) -> None:
        journal.append("walk", "perturb", 1, b"kept")
        again = IMPLEMENTATIONS[implementation][1](tmp_path).journal
        assert again.read("walk", "perturb", 1) == b"kept"
        assert list(again.names()) == [("walk", "perturb")]


class TestListing:
    def test_gives_the_numbers_in_numeric_order_with_their_gaps(self, journal: Journal) -> None:
        for seq in (10, 1, 9, 2, 100, 0):
            journal.append("walk", "perturb", seq, b"%d" % seq)
        assert journal.sequence("walk", "perturb") == [0, 1, 2, 9, 10, 100]

    def test_gives_every_name_once(self, journal: Journal) -> None:
        names = {("walk", "perturb"), ("walk", "carry"), ("run", "perturb"), ("0", "a.b-c_d")}
        for namespace, name in names:
            for seq in (1, 2):
                journal.append(namespace, name, seq, b"{}")
        found = list(journal.names())
        assert set(found) == names
        assert len(found) == len(names)

    def test_of_an_empty_journal_is_empty(self, journal: Journal) -> None:
        assert list(journal.names()) == []
        assert journal.sequence("walk", "perturb") == []


class TestWhatIsMalformed:
    @pytest.mark.parametrize("bad", MALFORMED.values(), ids=MALFORMED)
    def test_is_refused_as_namespace_and_as_name(self, journal: Journal, bad: str) -> None:
        for namespace, name in ((bad, "perturb"), ("walk", bad)):
            with pytest.raises(InvalidReference):
                journal.append(namespace, name, 1, b"{}")
            with pytest.raises(InvalidReference):
                journal.read(namespace, name, 1)
            with pytest.raises(InvalidReference):
                journal.sequence(namespace, name)
        assert list(journal.names()) == []

    @pytest.mark.parametrize("seq", [-1, 10**18, True, 1.0, "1/../2"])
    def test_is_refused_as_number(self, journal: Journal, seq: int) -> None:
        with pytest.raises(InvalidReference):
            journal.append("walk", "perturb", seq, b"{}")
        with pytest.raises(InvalidReference):
            journal.read("walk", "perturb", seq)
