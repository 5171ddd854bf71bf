"""The journal in a local folder: `<namespace>/<name>/<seq>.json`, each created once and whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from registry.core.digest import sha256_hex
from registry.core.errors import Corrupt, InvalidReference, NotFound
from registry.core.reference import parse_artifact
from registry.store import durable, files

_ENTRY = re.compile(r"(0|[1-9][0-9]{0,17})\.json")


class LocalJournal:
    """`Journal` in a local folder."""

    def __init__(self, folder: Path, temporaries: Path) -> None:
        """
        Args:
            folder: `journal` of the store.
            temporaries: a folder on the same file system.
        """
        self._folder = folder
        self._temporaries = temporaries

    def append(self, namespace: str, name: str, seq: int, document: bytes) -> None:
        path = self._path(namespace, name, seq)
        if durable.create_once(path, document, top=self._folder, temporaries=self._temporaries):
            return
        found = self.read(namespace, name, seq)
        if found != document:
            raise Corrupt(
                f"journal entry {path} holds another document: expected sha256 {sha256_hex(document)} "
                f"({len(document)} bytes), found {sha256_hex(found)} ({len(found)} bytes)"
            )

    def read(self, namespace: str, name: str, seq: int) -> bytes:
        path = self._path(namespace, name, seq)
        document = files.read_regular(path)
        if document is None:
            raise NotFound(f"no journal entry {seq} of {namespace}/{name}: {path} is missing")
        return document

    def contains(self, namespace: str, name: str, seq: int) -> bool:
        path = self._path(namespace, name, seq)
        with files.storage_errors(f"look for {path}", writing=False):
            return path.exists()

    def names(self) -> Iterator[tuple[str, str]]:
        for namespace in files.entries(self._folder):
            for name in files.entries(Path(namespace.path)):
                with suppress(InvalidReference):  # a stranger's folder is not a name
                    if self.sequence(namespace.name, name.name):
                        yield namespace.name, name.name

    def sequence(self, namespace: str, name: str) -> list[int]:
        folder = self._name_folder(namespace, name)
        matches = (_ENTRY.fullmatch(entry.name) for entry in files.entries(folder))
        return sorted(int(match[1]) for match in matches if match)

    def _name_folder(self, namespace: str, name: str) -> Path:
        return self._folder.joinpath(*parse_artifact(f"{namespace}/{name}"))

    def _path(self, namespace: str, name: str, seq: int) -> Path:
        folder, entry = self._name_folder(namespace, name), f"{seq}.json"
        if not _ENTRY.fullmatch(entry):
            raise InvalidReference(f"journal entry {seq!r} of {namespace}/{name}: expected a number from 0")
        return folder / entry
