"""Which base an adapter was trained on, guessed: by what its configuration records, held against the targets; without
that, by the targets alone where exactly one base has them all. What cannot be decided stays open and is said."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from registry.core.adapter_names import Target
from registry.core.layout import Layout
from registry.core.reference import URL_SCHEME, shown
from registry.core.run_names import says_something
from registry.formats.origin import origin_of
from registry.operations.base_fit import BaseModules, live_modules, misfit, modules_of

How = Literal["recorded", "fits", "undecided", "mismatch", "unknown"]
MOST_LISTED = 5


@dataclass(frozen=True, eq=False)
class Base:
    """A base that an adapter may have been trained on.

    Attributes:
        path: in the tree, where it lies there.
        reference: in the registry, where it is there.
        place: of `path`, with links resolved.
        called: paths and names by which it is known, each as its parts.
        layouts: reads the layout of each component.
        live_names: reads the map to the live names of each component, empty where there is none.
    """

    path: str | None
    reference: str | None
    place: str | None
    called: tuple[tuple[str, ...], ...]
    hub_id: str | None
    revision: str | None
    layouts: Callable[[], Mapping[str, Layout]]
    live_names: Callable[[], Mapping[str, Mapping[str, Any]]]

    @property
    def label(self) -> str:
        return self.reference or self.path or "?"

    @cached_property
    def modules(self) -> tuple[BaseModules, ...]:
        """As saved, by component."""
        return tuple(modules_of(layout) for layout in self.layouts().values())

    @cached_property
    def live(self) -> tuple[BaseModules, ...]:
        """As loaded, for the components of which that is known."""
        layouts, names = self.layouts(), self.live_names()
        return tuple(live_modules(layout, names[role]) for role, layout in layouts.items() if role in names)


@dataclass(frozen=True)
class BaseGuess:
    """What is thought of an adapter's base.

    Attributes:
        how: `recorded`: its configuration names it, and its targets are there (or cannot be held against it). `fits`:
            nothing names it, and of all bases it alone has the targets. `undecided`: several are as good. `mismatch`:
            what is named has not the targets. `unknown`: nothing is like it.
        recorded: what the configuration says.
        bases: the one, those that are as good, or those that do not fit.
        why: one line for the user, without a full stop.
    """

    how: How
    recorded: str | None = None
    bases: tuple[Base, ...] = ()
    why: str = ""


class BaseGuesser:
    """Guesses for many adapters over the same bases."""

    def __init__(self, bases: Iterable[Base], root: Path) -> None:
        """
        Args:
            root: relative paths that an adapter records may be relative to it.
        """
        self._bases = tuple(bases)
        self._root = root
        self._known: dict[tuple[int, int, bool], str | None] = {}
        self._targets: list[Sequence[Target]] = []
        """Kept, so that no other has the id of one that was asked about."""

    def guess(self, recorded: str | None, revision: str | None, targets: Sequence[Target], folder: Path) -> BaseGuess:
        """The base of one adapter.

        Args:
            recorded: `base_model_name_or_path`.
            targets: those that a base can be held against, see `asked_targets`; the same object for equal ones.
            folder: of the adapter.
        """
        self._targets.append(targets)
        if recorded:
            named, found_by = self._named(recorded, revision, folder)
            if named:
                return self._among_named(recorded, named, found_by, targets)
        if not targets:
            return BaseGuess("unknown", recorded, why=_unknown(recorded, "no target tells it"))
        possible = (base for base in self._bases if not (recorded and _is_another(base, recorded)))
        fitting = [base for base in possible if self._misfit(base, targets, ask_live=False) is None]
        if not fitting:
            return BaseGuess("unknown", recorded, why=_unknown(recorded, "no known base has all its targets"))
        if len(fitting) > 1:
            return BaseGuess("undecided", recorded, tuple(fitting), f"{len(fitting)} bases have all its targets")
        said = f"; {shown(recorded, 80)} is recorded" if recorded else ""
        return BaseGuess("fits", recorded, tuple(fitting), f"guessed: it alone has all targets{said}")

    def _among_named(self, recorded: str, named: Sequence[Base], found_by: str, targets: Sequence[Target]) -> BaseGuess:
        if not targets:
            how: How = "recorded" if len(named) == 1 else "undecided"
            return BaseGuess(how, recorded, tuple(named), f"recorded{found_by}; no target could be held against it")
        reasons = {base: self._misfit(base, targets, ask_live=True) for base in named}
        fitting = tuple(base for base, why in reasons.items() if why is None)
        if not fitting:
            first = named[0]
            why = f"{shown(recorded, 80)} is recorded, but {shown(first.label, 120)} does not fit: {reasons[first]}"
            return BaseGuess("mismatch", recorded, tuple(named), why)
        if len(fitting) > 1:
            return BaseGuess("undecided", recorded, fitting, f"{len(fitting)} bases are called {shown(recorded, 80)}")
        return BaseGuess("recorded", recorded, fitting, f"recorded{found_by}, and all targets are there")

    def _misfit(self, base: Base, targets: Sequence[Target], *, ask_live: bool) -> str | None:
        key = (id(base), id(targets), ask_live)
        if key not in self._known:
            why = _best(targets, base.modules)
            # To ask a library for the live names takes seconds, so only for a base that is named and does not fit.
            if why is not None and ask_live and base.live:
                why = _best(targets, base.live)
            self._known[key] = why
        return self._known[key]

    # ---- by what is recorded

    def _named(self, recorded: str, revision: str | None, folder: Path) -> tuple[tuple[Base, ...], str]:
        """The bases that it may mean, and how they were found where that says less than their whole name."""
        exact = self._by_place(recorded, folder) or self._by_hub(recorded, revision)
        return (exact, "") if exact else (self._by_tail(recorded), f" as {shown(recorded, 80)}")

    def _by_place(self, recorded: str, folder: Path) -> tuple[Base, ...]:
        if recorded.startswith(URL_SCHEME) or "\0" in recorded:
            return ()
        places = {os.path.realpath(around / recorded) for around in (self._root, folder)}
        return tuple(base for base in self._bases if base.place in places)

    def _by_hub(self, recorded: str, revision: str | None) -> tuple[Base, ...]:
        origin = origin_of(Path(recorded))
        hub_id, revision = origin.get("hub_id", recorded), origin.get("revision", revision)
        found = tuple(base for base in self._bases if base.hub_id == hub_id)
        of_revision = tuple(base for base in found if base.revision == revision)
        return of_revision or found

    def _by_tail(self, recorded: str) -> tuple[Base, ...]:
        """The bases whose path or name ends as the recorded one, with as many equal parts as there are."""
        wanted = path_parts(recorded.removeprefix(URL_SCHEME).partition("@")[0])
        lengths = {
            base: max((_equal_tail(wanted, called) for called in base.called), default=0)
            for base in self._bases
            if not _is_another(base, recorded)
        }
        longest = max(lengths.values(), default=0)
        return tuple(base for base, length in lengths.items() if length == longest) if longest else ()


def path_parts(text: str) -> tuple[str, ...]:
    """The parts of a path of any system, as far as they say something where names are compared."""
    return tuple(part.casefold() for part in re.split(r"[/\\]", text) if part not in ("", ".", ".."))


def _is_another(base: Base, recorded: str) -> bool:
    """Whether both are of the hub, and not the same there: models of one architecture fit the same adapters."""
    hub_id = origin_of(Path(recorded)).get("hub_id", recorded)
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) is not None
    return base.hub_id is not None and is_hub_id and hub_id.casefold() != base.hub_id.casefold()


def _equal_tail(wanted: Sequence[str], called: Sequence[str]) -> int:
    length = 0
    for one, other in zip(reversed(wanted), reversed(called), strict=False):
        if one != other:
            break
        length += 1
    tail = wanted[len(wanted) - length :]
    return length if any(map(says_something, tail)) else 0


def _best(targets: Sequence[Target], components: Sequence[BaseModules]) -> str | None:
    """None: one of the components has all targets; else what the first of them lacks."""
    reasons = [misfit(targets, modules) for modules in components]
    return None if None in reasons else next(iter(reasons), "it has no modules")


def _unknown(recorded: str | None, why: str) -> str:
    return f"{shown(recorded, 80)} is recorded, which is not here; {why}" if recorded else why


def listed(bases: Sequence[Base]) -> str:
    """Their labels for one line."""
    more = f" and {len(bases) - MOST_LISTED} more" if len(bases) > MOST_LISTED else ""
    return ", ".join(shown(base.label, 120) for base in bases[:MOST_LISTED]) + more
