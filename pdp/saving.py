"""Saving in a thread while training goes on. One save at a time; whatever comes next, or the end of the process,
waits for it and raises its failure, so that no failure is lost."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable

_waited_for: set[BackgroundSaver] = set()
"""Those whose save somebody has still to wait for."""


class BackgroundSaver:
    """Runs one save at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, save: Callable[[], object]) -> None:
        """Starts a save, after the one before has ended.

        Args:
            save: touches nothing that training goes on with.

        Raises:
            What the save before raised; the new one is not started.
        """
        self.join()
        _waited_for.add(self)
        self._thread = threading.Thread(target=self._run, args=(save,), name="pdp-saving")
        self._thread.start()

    def join(self) -> None:
        """Waits for the save that is running, if one.

        Raises:
            What it raised, once.
        """
        self.wait()
        self._thread = None
        _waited_for.discard(self)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Waits for the save that is running; its failure stays to be raised. An interrupt while waiting forgets
        nothing."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, save: Callable[[], object]) -> None:
        try:
            save()
        except BaseException as error:  # noqa: BLE001  # raised in the thread that waits for it
            self._failure = error


def wait_for_all() -> None:
    """Waits for every save of this process, so that who reads a file finds what was saved to it."""
    for saver in list(_waited_for):
        saver.wait()


def _join_at_exit() -> None:
    """Python ignores what its exit handlers raise, and would exit with 0: a lost checkpoint must not look like
    success."""
    failed = False
    for saver in list(_waited_for):
        try:
            saver.join()
        except BaseException:  # noqa: BLE001  # shown, and the exit status says so
            traceback.print_exc()
            failed = True
    if failed:
        print("pdp: the last checkpoint could not be saved (see above)", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


atexit.register(_join_at_exit)
