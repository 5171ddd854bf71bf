"""A catalog held against one that was made of the store alone: every row that differs is a problem, but for what two
catalogs of one registry may differ in."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Any

from registry.catalog.blobs import INDEX_MIN_BYTES
from registry.catalog.dump import Difference, Dump, IndexRow, Row, differences, key_columns, wrong_index_rows
from registry.core.digest import index_prefix, unpack_digests
from registry.core.event import format_moment
from registry.core.layout import TensorSpec
from registry.core.placement import unpack_entries
from registry.core.reference import shown
from registry.operations.histories import Histories
from registry.operations.problems import REINDEX, Problem

MOST = 100
"""Problems of one table that are told one by one."""
_SHOWN = 200
_SHARED = frozenset({"blob", "blob_tensors", "layout", "layout_tensor", "target", "lora_config", "lora_target"})


def holders(dumped: Dump) -> dict[str, set[str]]:
    """Versions by the blobs that they need, those that describe them included."""
    found: dict[str, set[str]] = {}
    for row in dumped["version_blob"].values():
        found.setdefault(row["blob_id"], set()).add(row["version_id"])
    for row in dumped["described_blob"].values():
        event = dumped["event"].get((row["artifact_id"], row["seq"]))
        if event is not None and event["version_id"] is not None:
            found.setdefault(row["blob_id"], set()).add(event["version_id"])
    return found


class Comparison:
    """Holds a catalog against what follows from the store.

    Args:
        rebuilt, found: dumps of the two.
        stopped: names of which not all could be rebuilt; nothing is said of their rows.
        damaged: blobs whose bytes are not to be believed.
    """

    def __init__(
        self,
        rebuilt: Dump,
        found: Dump,
        histories: Histories,
        *,
        stopped: Collection[str],
        damaged: Collection[str],
    ) -> None:
        self._rebuilt = rebuilt
        self._found = found
        self._histories = histories
        self._stopped = stopped
        self._damaged = damaged
        self._holders = holders(rebuilt)
        for digest, versions in holders(found).items():
            self._holders.setdefault(digest, set()).update(versions)
        self._purged = any(history.purged for history in histories.names.values())
        self._layouts = self._users("layout_id", "version", "component")
        self._configs = self._users("lora_config_id", "version")
        self.notes: list[str] = []

    def problems(self) -> Iterator[Problem]:
        """Every row that differs; of one table at most `MOST`, then the number of the others."""
        count: dict[str, int] = {}
        for difference in differences(self._rebuilt, self._found):
            if self._allowed(difference):
                continue
            count[difference.table] = count.get(difference.table, 0) + 1
            if count[difference.table] <= MOST:
                yield self._problem(difference)
        for table, number in count.items():
            if number > MOST:
                more = f"{number - MOST} more"
                yield Problem("row", table, "the rows that follow from the store", f"{more} that differ", (), REINDEX)

    def index_problems(self, rebuilt: set[IndexRow], found: set[IndexRow]) -> Iterator[Problem]:
        """Rows of the digest index that are false, and tensors that it does not know. Which of several holders it
        names is chance."""
        both: Dump = {"blob_tensors": {**self._found["blob_tensors"], **self._rebuilt["blob_tensors"]}}
        wrong = wrong_index_rows(found, both)
        for row in wrong[:MOST]:
            versions = tuple(sorted(self._holders.get(row.blob, ())))
            subject = f"tensor_index {row.prefix} in {row.blob}, {row.ordinal}"
            yield Problem("row", subject, "a tensor whose digest begins so", "another, or none", versions, REINDEX)
        known = {row.prefix for row in found.difference(wrong)}
        # Which version brought a blob first decides about small tensors, and gc may have let it go between two of them.
        if self._purged:
            known |= small_tensors(self._rebuilt)
        lacking = sorted(
            (row for row in rebuilt if row.prefix not in known),
            key=lambda row: (row.blob, row.ordinal),
        )
        for row in lacking[:MOST]:
            versions = tuple(sorted(self._holders.get(row.blob, ())))
            subject = f"tensor_index {row.prefix} in {row.blob}, {row.ordinal}"
            yield Problem("row", subject, "a row: the tensor is stored", "none", versions, REINDEX)
        if max(len(wrong), len(lacking)) > MOST:
            more = f"{len(wrong) + len(lacking) - 2 * MOST} more that differ"
            yield Problem("row", "tensor_index", "the rows that follow from the store", more, (), REINDEX)

    def tensor_problems(self) -> Iterator[Problem]:
        """Tensors that are placed where another tensor lies."""
        blobs = {key: row["blob_id"] for key, row in self._rebuilt["version_blob"].items()}
        held = {key[0]: unpack_digests(row["digests"]) for key, row in self._rebuilt["blob_tensors"].items()}
        for (version, role), row in sorted(self._rebuilt["component"].items()):
            digests, entries = unpack_digests(row["digests"]), unpack_entries(row["placement"])
            for place, (digest, (position, ordinal)) in enumerate(zip(digests, entries, strict=True)):
                there = held.get(blobs.get((version, position), ""), ())
                if ordinal >= len(there) or there[ordinal] != digest:
                    found = there[ordinal] if ordinal < len(there) else "no tensor"
                    mend = "push the artifact again under another name"
                    subject = f"{place} of the {role} of {version}"
                    yield Problem("tensor", subject, f"digest {digest}", found, (version,), mend)

    def _users(self, column: str, *tables: str) -> dict[str, set[str]]:
        users: dict[str, set[str]] = {}
        for dumped in (self._rebuilt, self._found):
            for table in tables:
                for key, row in dumped[table].items():
                    if row[column] is not None:
                        version = row["version_id"] if table == "component" else f"{key[0]}@{key[1]}"
                        users.setdefault(row[column], set()).add(version)
        return users

    def _allowed(self, difference: Difference) -> bool:
        """Whether the difference is none of the catalog's making."""
        table, key, column = difference.table, difference.key, difference.column
        row: Row = difference.found if column is None and difference.found is not None else {}
        if self._stopped and (not self._named(table, key, row).isdisjoint(self._stopped)):
            return True
        if column is None and difference.expected is None:
            if self._stopped and table in _SHARED:
                return True
            if table in ("blob", "blob_tensors"):
                return self._waits_for_gc(key[0])
            if table in ("layout", "layout_tensor", "target"):
                return self._purged and not self._is_used(key[0])
        if table == "blob" and column == "created_at":
            # Of two that came at once either may have been first, and gc may have let it go between two events.
            return difference.found in self._histories.named_at.get(key[0], ())
        if table == "blob" and column in ("size", "layout_id"):
            return key[0] in self._damaged
        if table == "blob" and column == "state" and (difference.expected, difference.found) == ("present", "external"):
            self.notes.append(f"blob {key[0]} is recorded as external, and its bytes are in the store: push it again")
            return True
        if table == "finding":
            # Without the files as they were pushed the spelling of some findings cannot be told.
            version = self._rebuilt["version"].get(_split(str(key[0])))
            return version is not None and version["state"] == "purged"
        return False

    def _waits_for_gc(self, digest: str) -> bool:
        blob = self._found["blob"].get((digest,))
        return digest not in self._holders and (blob is None or blob["state"] == "deleting" or self._purged)

    def _is_used(self, layout: str) -> bool:
        of_blobs = (row["layout_id"] == layout for row in self._rebuilt["blob"].values())
        return bool(self._layouts.get(layout)) or any(of_blobs)

    def _named(self, table: str, key: tuple[Any, ...], row: Row) -> set[str]:
        """Names that a row is about."""
        columns = key_columns(table)
        if table == "artifact":
            return {f"{key[0]}/{key[1]}"}
        values = {**dict(zip(columns, key, strict=True)), **row}
        found = set()
        for column in ("artifact_id", "version_id", "child_id", "parent_id"):
            if isinstance(values.get(column), str):
                found.add(values[column].partition("@")[0])
        return found

    def _problem(self, difference: Difference) -> Problem:
        table, key, column = difference.table, difference.key, difference.column
        subject = f"{table} {', '.join(_text(part) for part in key)}"
        versions = tuple(sorted(self._suffering(table, key, (difference.expected, difference.found))))
        if column is None:
            there, none = "a row", "none"
            expected, found = (none, there) if difference.expected is None else (there, none)
        else:
            subject += f": {column}"
            expected, found = _text(difference.expected), _text(difference.found)
        return Problem("row", subject, expected, found, versions, REINDEX)

    def _suffering(self, table: str, key: tuple[Any, ...], rows: tuple[Any, ...]) -> set[str]:
        if table == "version":
            return {f"{key[0]}@{key[1]}"}
        if table in ("blob", "blob_tensors"):
            return self._holders.get(key[0], set())
        if table in ("layout", "layout_tensor", "target"):
            return self._layouts.get(key[0], set())
        if table in ("lora_config", "lora_target"):
            return self._configs.get(key[0], set())
        columns = key_columns(table)
        if "version_id" in columns:
            return {str(key[columns.index("version_id")])}
        if table == "lineage":
            return {str(key[columns.index("child_id")])}
        found = set()
        for dumped in (self._rebuilt, self._found):
            row = dumped[table].get(key, {})
            if table == "described_blob":
                row = dumped["event"].get(key[:2], {})
            if row.get("version_id") is not None:
                found.add(row["version_id"])
        return found


def _split(version: str) -> tuple[str, int]:
    name, _, number = version.rpartition("@")
    return name, int(number) if number.isdecimal() else 0


def _text(value: Any) -> str:
    if isinstance(value, datetime):
        return format_moment(value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes {value[:16].hex()}..."
    return shown(value if isinstance(value, str) else repr(value), _SHOWN)


def small_tensors(dumped: Dump) -> set[int]:
    """Prefixes of tensors below the size from which every kind of version has them indexed."""
    sizes: dict[str, list[tuple[int, int]]] = {}
    for (layout, position), row in dumped["layout_tensor"].items():
        shape = tuple(map(int, row["shape"].split(","))) if row["shape"] else ()
        sizes.setdefault(layout, []).append((position, TensorSpec(row["name"], row["dtype"], shape).nbytes))
    found: set[int] = set()
    for (digest,), row in dumped["blob"].items():
        if row["layout_id"] is None:
            continue
        held = unpack_digests(dumped["blob_tensors"][digest,]["digests"])
        for position, nbytes in sizes.get(row["layout_id"], ()):
            if nbytes < INDEX_MIN_BYTES:
                found.add(index_prefix(held[position]))
    return found
