"""What a test process leaves out, because the tests do not see it: waiting for the disk, which only a power cut would
notice; asking git and the installed packages at each push for what stays the same; and a process of 4 s for each
question to transformers. Processes that tests start anew do all of it, and so do the tests of these things."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

connect = sqlite3.connect
fsync = os.fsync


class UnsyncedConnection(sqlite3.Connection):
    """Hands everything to the operating system as ever, and does not wait until it is on the disk."""

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if sql == "PRAGMA synchronous = FULL":
            return super().execute("PRAGMA synchronous = OFF", *arguments)
        if sql == "PRAGMA journal_mode = WAL":
            with suppress(sqlite3.Error):  # the statement itself says what is wrong
                super().execute("PRAGMA synchronous = OFF")
        return super().execute(sql, *arguments)


def _unsynced_connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
    return connect(*arguments, **{"factory": UnsyncedConnection} | options)


def _unsynced(descriptor: int) -> None:
    os.fstat(descriptor)  # a closed one is still an error


@contextmanager
def unsynced() -> Iterator[None]:
    """Without fsync, in this process and those forked from it. Who kills a process proves as much as before: what was
    written is the operating system's then. That fsync is called, and in which order, tests/store sees by its calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", _unsynced)
        patch.setattr(sqlite3, "connect", _unsynced_connect)
        yield


@contextmanager
def one_environment() -> Iterator[None]:
    """Asks for the version of a package, and for the state of this checkout, once a process."""
    from registry.operations import environment

    ask, version = environment._git, cache(environment._version)
    known: dict[tuple[str, ...], str | None] = {}

    def git(*arguments: str) -> str | None:
        try:
            is_checkout = os.path.samefile(".", CHECKOUT)
        except OSError:  # the working folder is gone
            is_checkout = False
        if not is_checkout:
            return ask(*arguments)
        if arguments not in known:
            known[arguments] = ask(*arguments)
        return known[arguments]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "_git", git)
        patch.setattr(environment, "_version", version)
        yield


@contextmanager
def transformers_asked_here() -> Iterator[None]:
    """The program that asks transformers for the live names of a model runs in this process, which has imported it.
    Use the fixture `transformers_asked_apart` where the process is the question."""
    from registry.formats import live_names

    with pytest.MonkeyPatch.context() as patch:
        here = SimpleNamespace(run=_answer_here, TimeoutExpired=subprocess.TimeoutExpired)
        patch.setattr(live_names, "subprocess", here)
        yield


def _answer_here(command: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
    from registry.formats.live_names_worker import NoMap, describe

    request = json.loads(input)
    try:
        with warnings.catch_warnings():  # which are no errors in a process of its own
            warnings.simplefilter("ignore")
            answer = describe(request["config"], request["tensors"])
    except Exception as error:  # noqa: BLE001, as the program does, which answers whatever it was
        text = " ".join(str(error).split())[:500]
        answer = {"why": text if isinstance(error, NoMap) else f"{type(error).__name__}: {text}"}
    return subprocess.CompletedProcess(command, 0, json.dumps(answer), "")
