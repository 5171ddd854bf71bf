"""The keys of a configuration that decide which modules PEFT wraps, and in which rank: names that select exactly the
modules of an adapter, and patterns that tell them apart. Paths and texts only."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from registry.core.adapter_config import AdapterConfig
from registry.core.errors import InvalidInput
from registry.core.name_patterns import PatternTable, Undecided
from registry.core.reference import shown

_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_PLAIN = re.compile(r"[\w.-]*")


def agreed(like: Sequence[AdapterConfig], key: str) -> Any:
    """What all sources say; None where one says otherwise or nothing."""
    values = [one.document.get(key) for one in like]
    return values[0] if values and all(value == values[0] for value in values) else None


def selection(
    wanted: Sequence[str],
    like: Sequence[AdapterConfig],
    all_paths: Collection[str] | None,
    given: Sequence[str] | None,
) -> dict[str, Any]:
    """Keys that make PEFT wrap the wanted modules; short names where they select exactly these."""
    nothing: dict[str, Any] = {key: None for key in _SELECTION if any(key in one.document for one in like)}
    if not wanted:
        return {**nothing, "target_modules": []}
    if all_paths is None and not given and like:
        kept = {key: agreed(like, key) for key in _SELECTION}
        alike = all(one.document.get(key) == kept[key] for one in like for key in _SELECTION)
        if alike and kept["target_modules"] and _selects(like[0], wanted):
            return nothing | {key: value for key, value in kept.items() if key in nothing}
    for names in _candidates(wanted, like, all_paths, given):
        chosen = set(names)
        if all_paths is None:
            return {**nothing, "target_modules": sorted(chosen)}
        if {path for path in (*all_paths, *wanted) if _ends_in(path, chosen)} == set(wanted):
            return {**nothing, "target_modules": sorted(chosen)}
    return {**nothing, "target_modules": "|".join(re.escape(path) for path in sorted(wanted))}


def _selects(config: AdapterConfig, wanted: Sequence[str]) -> bool:
    """Whether what a source selects its modules by names all of these; layers that it leaves out are no matter, since
    the same expression left them out of the source."""
    named = config.target_modules
    if isinstance(named, tuple):
        return all(_ends_in(path, set(named)) for path in wanted)
    if named is None or named.lower() == "all-linear":
        return named is not None
    table = PatternTable([f"^(?:{named})"])
    try:
        return all(table.find(path) is not None for path in wanted)
    except Undecided:
        return False


def _candidates(
    wanted: Sequence[str],
    like: Sequence[AdapterConfig],
    all_paths: Collection[str] | None,
    given: Sequence[str] | None,
) -> Iterator[Iterable[str]]:
    """Lists of names to try, the shortest first. Without knowledge of the base a list of short names is safe only where
    each source wrapped whatever has its names."""
    if given and (all_paths is not None or all(_ends_in(path, set(given)) for path in wanted)):
        yield given
    lists = [one.target_modules for one in like if isinstance(one.target_modules, tuple)]
    plain = all(not one.exclude_modules and not one.layers_to_transform and not one.modules_to_save for one in like)
    union = [name for names in lists for name in names]
    if len(lists) == len(like) and union and (all_paths is not None or plain):
        chosen = set(union)
        if all(_ends_in(path, chosen) for path in wanted):
            yield union
    if all_paths is not None:
        for count in (1, 2):
            yield {".".join(path.split(".")[-count:]) for path in wanted}
    yield wanted


def _ends_in(path: str, names: Collection[str]) -> bool:
    """Whether PEFT takes a module for one of the names: it is one, or ends in one behind a dot."""
    return path in names or any(path[at + 1 :] in names for at, letter in enumerate(path) if letter == ".")


def rank_pattern(slots: Mapping[str, int], rank: int) -> dict[str, int]:
    r"""Keys for the paths of another rank, none of which matches another path, so that their order does not matter.

    PEFT takes the first key with `re.match(rf"(.*\.)?({key})$", path)`: a path is a key for itself, and for paths that
    end in it.

    Args:
        slots: rank by the path under which PEFT looks it up.
        rank: of the paths that need no key.

    Raises:
        InvalidInput: no such keys exist.
    """
    others = {path: one for path, one in sorted(slots.items()) if one != rank}
    for write in _WAYS:
        keys = {path: write(path) if _PLAIN.fullmatch(path) else _escaped(path) for path in others}
        # A plain key matches no path that is shorter than itself. So with shorter keys first, the one that is found is
        # the path's own only if no other one matches; those of one length are tried both ways round.
        downward = sorted(sorted(keys.values(), reverse=True), key=len)
        tables = PatternTable(sorted(keys.values(), key=lambda key: (len(key), key))), PatternTable(downward)
        try:
            if all(table.find(path) == keys.get(path) for table in tables for path in slots):
                return {keys[path]: one for path, one in others.items()}
        except Undecided:
            continue
    raise InvalidInput(
        f"no rank_pattern of PEFT tells these {len(others)} modules apart that have other ranks than most, "
        f"{shown(next(iter(others)), 200)} first; give one rank for all"
    )


def _whole(path: str) -> str:
    return f"^{path}"


def _escaped(path: str) -> str:
    return f"^{re.escape(path)}"


_WAYS: tuple[Callable[[str], str], ...] = (str, _whole, _escaped)
