r"""The keys of `rank_pattern` and `alpha_pattern`: PEFT takes the first for which `re.match(rf"(.*\.)?({key})$", path)`
holds. A file from outside brings those keys, and Python's `re` can take years over forty characters, so nothing here
backtracks: plain names are looked up, expressions run on sets of states, and all of it under a budget of work.

An expression may use literals, `.`, `^`, `$`, `\d \w \s` and their capitals, escaped punctuation, `[...]`, `(...)`,
`(?:...)`, `|`, `* + ? {m} {m,} {m,n}` (lazy or not). Look-around, back-references, flags and possessive forms are not
evaluated, nor is what exceeds the limits below: then the answer is `Undecided`, never a guess."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

MAX_KEYS = 100_000
MAX_EXPRESSIONS = 500
MAX_EXPRESSION_LENGTH = 500
MAX_INSTRUCTIONS = 1_000
MAX_NESTING = 20
MAX_PATH_LENGTH = 1_000
MAX_PATH_DEPTH = 60
MAX_KEPT = 200_000
BUDGET = 2_000_000
"""Steps that one table may take in its life: a second of Python, or ten expressions on 4,000 modules."""

_SPECIAL = frozenset("\\^$*+?{}[]()|")
_COUNTS = re.compile(r"\{(\d{1,4})?(,)?(\d{1,4})?\}")
_CATEGORIES = frozenset("dDwWsS")


class Undecided(Exception):
    """Which key PEFT would take cannot be said within the limits of this module."""


class PatternTable:
    """The keys of one pattern dictionary, in their order.

    Attributes:
        unreadable: the keys that cannot be evaluated. A path that an earlier key matches is still decided.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = tuple(keys)
        self._left = BUDGET
        self._found: dict[str, str | None] = {}
        # Plain keys by length, then by where their dots stand: a dot matches any character, so two keys with dots in
        # the same places are told apart by their other characters, which one dictionary does for thousands of them.
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._whole: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._expressions: list[tuple[int, _Program | None]] = []
        self._too_many = len(self._keys) > MAX_KEYS
        for index, key in enumerate(self._keys[:MAX_KEYS]):
            body = key.removeprefix("^")
            if _SPECIAL.isdisjoint(body):
                table = self._plain if body == key else self._whole
                dots = tuple(place for place, letter in enumerate(body) if letter == ".")
                table.setdefault(len(body), {}).setdefault(dots, {}).setdefault(body, index)
            else:
                readable = len(self._expressions) < MAX_EXPRESSIONS
                self._expressions.append((index, _compile(key) if readable else None))

    @property
    def unreadable(self) -> tuple[str, ...]:
        return tuple(self._keys[index] for index, program in self._expressions if program is None)

    def find(self, path: str) -> str | None:
        """The key that PEFT takes for a module, None where none matches.

        Args:
            path: of the module in the base model, as PEFT sees it (no `base_model.model.`).

        Raises:
            Undecided: a key before the first match cannot be evaluated, or the limits are exceeded.
        """
        if path not in self._found:
            self._found[path] = self._find(path)
        return self._found[path]

    def _find(self, path: str) -> str | None:
        if self._too_many:
            raise Undecided(f"{len(self._keys)} keys, and {MAX_KEYS} are the limit")
        starts = [0, *(place + 1 for place, letter in enumerate(path) if letter == ".")]
        if len(path) > MAX_PATH_LENGTH or len(starts) > MAX_PATH_DEPTH or "\n" in path:
            raise Undecided(f"the name of {len(path)} characters is too long, too deep or holds a line feed")
        best = min(self._look_up(self._whole, path), len(self._keys))
        for start in starts:
            best = min(best, self._look_up(self._plain, path[start:]))
        for index, program in self._expressions:
            if index > best:
                break
            if program is None:
                raise Undecided(f"the key {self._keys[index][:80]!r} is not evaluated")
            if program.matches(path, self._spend):
                best = index
                break
        return self._keys[best] if best < len(self._keys) else None

    def _look_up(self, table: dict[int, dict[tuple[int, ...], dict[str, int]]], text: str) -> int:
        """The first plain key that equals the text, its dots standing for any character."""
        best = len(self._keys)
        for dots, indices in table.get(len(text), {}).items():
            self._spend(1 + len(dots))
            letters = list(text)
            for place in dots:
                letters[place] = "."
            best = min(best, indices.get("".join(letters), best))
        return best

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise Undecided("the patterns take too much work")


# An expression becomes a list of instructions that is run on all its states at once (Thompson 1968; Cox 2007, Regular
# Expression Matching Can Be Simple And Fast): a letter costs at most one visit an instruction, whatever the input.
_Test = Callable[[str], object]


@dataclass(frozen=True)
class _Letter:
    test: _Test


@dataclass(frozen=True)
class _Edge:
    start: bool


@dataclass(frozen=True)
class _Row:
    parts: tuple[_Node, ...]


@dataclass(frozen=True)
class _Choice:
    parts: tuple[_Node, ...]


@dataclass(frozen=True)
class _Repeat:
    part: _Node
    least: int
    most: int | None


_Node = _Letter | _Edge | _Row | _Choice | _Repeat


class _Instruction(NamedTuple):
    """Reads a letter (`test`), stands at an edge (`start` says which), or goes on at all of `to`."""

    test: _Test | None = None
    start: bool | None = None
    to: tuple[int, ...] = ()


class _Unreadable(Exception):
    """The expression is malformed, or uses what this module does not evaluate."""


def _compile(key: str) -> _Program | None:
    try:
        return _Program(_Parser(key).parse())
    except _Unreadable:
        return None


class _Parser:
    def __init__(self, text: str) -> None:
        if len(text) > MAX_EXPRESSION_LENGTH:
            raise _Unreadable
        self._text = text
        self._at = 0

    def parse(self) -> _Node:
        node = self._choice(0)
        if self._at < len(self._text):
            raise _Unreadable
        return node

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _choice(self, depth: int) -> _Node:
        if depth > MAX_NESTING:
            raise _Unreadable
        rows = [self._row(depth)]
        while self._next() == "|":
            self._at += 1
            rows.append(self._row(depth))
        return rows[0] if len(rows) == 1 else _Choice(tuple(rows))

    def _row(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self._next() not in ("", "|", ")"):
            parts.append(self._counted(self._atom(depth)))
        return _Row(tuple(parts))

    def _counted(self, node: _Node) -> _Node:
        letter = self._next()
        if letter in ("*", "+", "?"):
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[letter]
            self._at += 1
        elif letter == "{":
            found = _COUNTS.match(self._text, self._at)
            low, comma, high = found.groups() if found else (None, None, None)
            if not found or (not comma and (low is None or high is not None)):
                raise _Unreadable
            least = int(low or 0)
            most = least if not comma else int(high) if high else None
            self._at = found.end()
        else:
            return node
        if isinstance(node, _Edge) or (most is not None and most < least):
            raise _Unreadable
        if self._next() == "?":  # lazy or not is the same where only yes or no is asked
            self._at += 1
        if self._next() in ("*", "+", "?", "{"):
            raise _Unreadable
        return _Repeat(node, least, most)

    def _atom(self, depth: int) -> _Node:
        letter = self._next()
        self._at += 1
        if letter == "(":
            if self._next() == "?":
                if not self._text.startswith("?:", self._at):
                    raise _Unreadable
                self._at += 2
            node = self._choice(depth + 1)
            if self._next() != ")":
                raise _Unreadable
            self._at += 1
            return node
        if letter == "[":
            return self._set()
        if letter == "\\":
            escaped = self._next()
            self._at += 1
            if escaped in _CATEGORIES:
                return _Letter(re.compile("\\" + escaped).fullmatch)
            if not escaped or (escaped.isascii() and escaped.isalnum()):
                raise _Unreadable
            return _Letter(escaped.__eq__)
        if letter == ".":
            return _Letter("\n".__ne__)
        if letter in ("^", "$"):
            return _Edge(start=letter == "^")
        if letter in _SPECIAL:
            raise _Unreadable
        return _Letter(letter.__eq__)

    def _set(self) -> _Node:
        start = self._at - 1
        self._at += self._next() == "^"
        self._at += self._next() == "]"  # a bracket that comes first is one of the letters
        while self._next() != "]":
            # The rest are the beginnings of set operations, which `re` warns of and may read otherwise one day.
            if self._next() in ("", "[") or self._text[self._at : self._at + 2] in ("--", "&&", "~~", "||"):
                raise _Unreadable
            self._at += 2 if self._next() == "\\" else 1
        self._at += 1
        try:
            return _Letter(re.compile(self._text[start : self._at]).fullmatch)
        except re.error:
            raise _Unreadable from None


class _Program:
    def __init__(self, node: _Node) -> None:
        self._code: list[_Instruction] = []
        self._size = 0
        self._emit(node)
        self._end = len(self._code)
        self._reached: dict[tuple[int, bool, bool], tuple[frozenset[int], bool]] = {}
        # The paths of one model are much alike, so nearly every step has been made before.
        self._steps: dict[tuple[frozenset[int], str, bool], tuple[frozenset[int], bool]] = {}
        self._kept = 0

    def _emit(self, node: _Node) -> None:
        # Counted by node, not by instruction: a repeated nothing has no instructions, and may be repeated often.
        self._size += 1
        if self._size > MAX_INSTRUCTIONS:
            raise _Unreadable
        if isinstance(node, _Letter):
            self._code.append(_Instruction(test=node.test))
        elif isinstance(node, _Edge):
            self._code.append(_Instruction(start=node.start))
        elif isinstance(node, _Row):
            for part in node.parts:
                self._emit(part)
        elif isinstance(node, _Choice):
            fork = self._reserve()
            begins, jumps = [], []
            for part in node.parts:
                begins.append(len(self._code))
                self._emit(part)
                jumps.append(self._reserve())
            self._code[fork] = _Instruction(to=tuple(begins))
            for jump in jumps:
                self._code[jump] = _Instruction(to=(len(self._code),))
        else:
            for _ in range(node.least):
                self._emit(node.part)
            if node.most is None:
                fork = self._reserve()
                self._emit(node.part)
                self._code.append(_Instruction(to=(fork,)))
                self._code[fork] = _Instruction(to=(fork + 1, len(self._code)))
            else:
                forks = []
                for _ in range(node.most - node.least):
                    forks.append(self._reserve())
                    self._emit(node.part)
                for fork in forks:
                    self._code[fork] = _Instruction(to=(fork + 1, len(self._code)))

    def _reserve(self) -> int:
        self._code.append(_Instruction())
        return len(self._code) - 1

    def matches(self, path: str, spend: Callable[[int], None]) -> bool:
        """Whether the whole path, or what follows one of its dots, is matched to its end."""
        states: frozenset[int] = frozenset()
        done = False
        for place in range(len(path) + 1):
            step = (states, path[place - 1] if place else "", place == len(path))
            known = self._steps.get(step)
            if known is None:
                known = self._step(*step, spend)
                self._kept += 1 + len(known[0])
                if self._kept > MAX_KEPT:
                    self._steps.clear()
                    self._kept = 0
                self._steps[step] = known
            spend(1)
            states, done = known
        return done

    def _step(
        self, states: frozenset[int], letter: str, at_end: bool, spend: Callable[[int], None]
    ) -> tuple[frozenset[int], bool]:
        """The states after a letter (none at the start), and whether the end is one of them."""
        following: set[int] = set()
        done = False
        sources = [state + 1 for state in states if self._reads(state, letter)]
        if letter in ("", "."):
            sources.append(0)
        spend(len(states))
        for source in sources:
            reached, ended = self._reach(source, (letter == "", at_end), spend)
            spend(1 + len(reached))
            following |= reached
            done |= ended
        return frozenset(following), done

    def _reads(self, state: int, letter: str) -> bool:
        test = self._code[state].test
        return test is not None and bool(test(letter))

    def _reach(
        self, source: int, edges: tuple[bool, bool], spend: Callable[[int], None]
    ) -> tuple[frozenset[int], bool]:
        """The tests that come next from an instruction, and whether the end does."""
        known = self._reached.get((source, *edges))
        if known is not None:
            return known
        at_start, at_end = edges
        seen = {source}
        waiting = [source]
        tests = set()
        while waiting:
            state = waiting.pop()
            if state == self._end:
                continue
            instruction = self._code[state]
            if instruction.test is not None:
                tests.add(state)
                continue
            if instruction.start is None:
                onward = instruction.to
            else:
                onward = (state + 1,) if (at_start if instruction.start else at_end) else ()
            waiting.extend(step for step in onward if step not in seen)
            seen.update(onward)
        spend(len(seen))
        known = frozenset(tests), self._end in seen
        self._reached[(source, *edges)] = known
        return known
