"""Every stage of an operation, one after the other: the calls by which it changes the disk, each commit and, where they
are asked for, each SQL statement. At the n-th of them something happens (the process is killed, a user presses Ctrl-C),
for every n until the operation comes through. To be used in a process of its own, see `support.own_process`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from sqlalchemy import Engine, event

from tests.failures.support import forked

CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir")
TOO_MANY = 600

Act = Callable[[], None]


class Stages:
    """Counts stages, and acts at one of them.

    Attributes:
        reached: stages so far; the calls of worker threads are counted as well.
        acted: what the stage was at which something happened, None before.
    """

    def __init__(self, at: int, act: Act, *, after: bool) -> None:
        self.reached = 0
        self.acted: str | None = None
        self._at = at
        self._act = act
        self._after = after
        self._lock = threading.Lock()

    def next(self) -> bool:
        with self._lock:
            self.reached += 1
            return self.reached == self._at

    def wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            now = self.next()
            if now:
                self.acted = f"{name} {arguments[0]!s:.200}"
                if name == "write":  # a torn one
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                if not self._after:
                    self._act()
            try:
                return call(*arguments, **options)
            finally:
                if now and self._after:
                    self._act()

        return wrapper

    def statement(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if self.next():
            self.acted = statement
            self._act()

    def commit(self, _connection: Any) -> None:
        if self.next():
            self.acted = "commit"
            self._act()


@contextmanager
def acting_at(at: int, act: Act, *, after: bool = False, statements: bool = False) -> Iterator[Stages]:
    """Within the body, `act` is called at the n-th stage.

    Args:
        after: when a call or statement has been done, instead of before it.
        statements: count them too.
    """
    stages = Stages(at, act, after=after)
    real = {name: getattr(os, name) for name in CALLS}
    when = "after_cursor_execute" if after else "before_cursor_execute"
    if statements:
        event.listen(Engine, when, stages.statement)
    event.listen(Engine, "commit", stages.commit)
    for name, call in real.items():
        setattr(os, name, stages.wrapped(name, call))
    try:
        yield stages
    finally:
        for name, call in real.items():
            setattr(os, name, call)
        if statements:
            event.remove(Engine, when, stages.statement)
        event.remove(Engine, "commit", stages.commit)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def killed_at_every_stage(prepare: Callable[[int], Callable[[], object]]) -> Iterator[tuple[int, bool]]:
    """Forks for each stage a child that does the work and is killed there. Between two statements of a transaction
    nothing on the disk tells where the process was, so statements are no stages here.

    Args:
        prepare: gives the work for the child of this number; it is called in this process.

    Yields:
        The number of the child, once it is dead, and whether it was killed; the last one was not.
    """
    for number in count(1):
        assert number < TOO_MANY, "the work does not come to an end"
        work = prepare(number)

        def killed(number: int = number, work: Callable[[], object] = work) -> None:
            with acting_at(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                work()

        code = forked(killed)
        assert code in (0, -signal.SIGKILL), f"child {number} ended with {code}"
        yield number, code != 0
        if code == 0:
            return


def interrupted_at_every_stage(
    prepare: Callable[[int], Callable[[], object]], *, after: bool, statements: bool = False
) -> Iterator[int]:
    """Does the work again and again in this process, with a Ctrl-C at each stage in turn; see `acting_at`.

    Yields:
        The number of the stage, after the work ended with a KeyboardInterrupt. The last one ended well.
    """
    for number in count(1):
        assert number < TOO_MANY, "the work does not come to an end"
        work = prepare(number)
        try:
            with acting_at(number, ctrl_c, after=after, statements=statements) as stages:
                work()
        except KeyboardInterrupt:
            assert stages.acted is not None
            yield number
        else:
            assert stages.acted is None, f"the Ctrl-C at {stages.acted} was swallowed"
            return
