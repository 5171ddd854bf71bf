"""What an adoption is as values: an item for each artifact of a tree, from the plan to the verdict, and the whole with
what was counted beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from registry.formats.scan import Skipped
from registry.operations.base_guess import BaseGuess

Verdict = Literal["new", "adopted", "there", "duplicate", "left out", "broken"]
Progress = Callable[[str, int, int, str], None]
"""Called with a phase (`scan`, `look`, `push`), how many are done, of how many (0: not known), and a path."""


@dataclass(frozen=True)
class Item:
    """One artifact of the tree.

    Attributes:
        path: relative to the tree, `.` for the tree itself.
        form: `peft`, `model` or `file`.
        kind: adapter, base or checkpoint; None where it could not be read.
        name: `namespace/name` that it gets.
        step: of training, as its path or its trainer_state.json says.
        size: bytes of its files.
        external: recorded without its bytes.
        guess: of an adapter that is not in yet.
        base: the base that it was pushed with, `namespace/name@number`.
        continued_from: likewise, the checkpoint before it.
        verdict: `new`: only planned. `adopted`: pushed. `there`: in already, from this path. `duplicate`: in already,
            from elsewhere. `left out`: could be read and is no artifact, or was removed. `broken`: refused.
        reference: the version that has its content.
        why: one line on the verdict.
        findings: how many errors and warnings its push noticed.
        notes: what its push left out or does not know.
    """

    path: str
    form: str
    kind: str | None
    name: str
    step: int | None
    size: int
    external: bool = False
    guess: BaseGuess | None = None
    base: str | None = None
    continued_from: str | None = None
    verdict: Verdict = "new"
    reference: str | None = None
    why: str = ""
    findings: int = 0
    bytes_new: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adoption:
    """A tree that was adopted, or, after a dry run, how it would be.

    Attributes:
        items: in the order in which they are pushed: bases first, then run by run.
        skipped: links and folders that were not entered, and folders that cannot be read.
        counted: what is no artifact, by kind.
    """

    root: Path
    namespace: str
    items: tuple[Item, ...]
    skipped: tuple[Skipped, ...]
    counted: Mapping[str, int]
    dry_run: bool

    @property
    def verdicts(self) -> dict[str, int]:
        """How many items there are of each verdict."""
        return dict(Counter(item.verdict for item in self.items))

    @property
    def is_whole(self) -> bool:
        """Whether all that was found is in (or would be), and nothing could not be read."""
        return not any(item.verdict == "broken" for item in self.items) and not any(
            skipped.unreadable for skipped in self.skipped
        )

    @property
    def bytes_new(self) -> int:
        return sum(item.bytes_new for item in self.items)

    @property
    def without_base(self) -> tuple[Item, ...]:
        """Adapters that are in, or would be, without a base."""
        return tuple(
            item
            for item in self.items
            if item.kind == "adapter"
            and (
                (item.verdict in ("adopted", "there") and item.base is None)
                or (item.verdict == "new" and (item.guess is None or item.guess.how not in ("recorded", "fits")))
            )
        )
