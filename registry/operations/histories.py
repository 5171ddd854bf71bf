"""The journal as a rebuild needs it: one strict pass over the events of every name, which keeps of each what cannot be
told from the event alone: its final state, where its bytes lie now, who brought a blob first. Events are read again,
one at a time, when they are replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

from registry.core.canonical_json import parse_json
from registry.core.errors import Corrupt, DigestMismatch, NotFound, RegistryError
from registry.core.event import Event
from registry.core.journal_document import read_event
from registry.core.placement import Placement
from registry.core.reference import shown
from registry.store.interface import Store

BROUGHT = ("tensors", "external")
"""Roles of a blob in those versions that brought its tensors."""


@dataclass(frozen=True)
class Fault:
    """An entry of the journal that cannot be believed.

    Attributes:
        kind: `missing` or `damaged`.
        found: what was found instead.
    """

    namespace: str
    name: str
    seq: int
    kind: str
    found: str

    @property
    def reference(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def entry(self) -> str:
        return f"journal/{self.reference}/{self.seq}.json"

    def __str__(self) -> str:
        return f"{self.entry} is {self.kind}: {self.found}"


@dataclass
class Fate:
    """What became of a version after its push.

    Attributes:
        state: `present`, `removed` or `purged`.
        placed_by: seq of the event whose placement holds.
    """

    state: str
    placed_by: int


@dataclass
class History:
    """The events of one name, as far as they can be followed.

    Attributes:
        times: of each event, from seq 1.
        newest: seq of the last entry that its journal has.
        fates: by number.
        purged: whether a version of it ever was.
        faults: what is wrong with its journal. Where nobody else knew an event, the history ends before it.
    """

    namespace: str
    name: str
    newest: int = 0
    times: list[datetime] = field(default_factory=list)
    fates: dict[int, Fate] = field(default_factory=dict)
    purged: bool = False
    faults: list[Fault] = field(default_factory=list)

    @property
    def reference(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass
class Histories:
    """All names.

    Attributes:
        makers: for each blob of tensors the events (by name and seq) that brought it, oldest first.
        named_at: for each blob that an event names, the times of those events.
    """

    store: Store
    names: dict[str, History] = field(default_factory=dict)
    makers: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    named_at: dict[str, set[datetime]] = field(default_factory=dict)
    known: Mapping[tuple[str, int], Event] = field(default_factory=dict)

    def event(self, reference: str, seq: int) -> Event:
        """An event that was read before; that its document is canonical is not proven again."""
        if (reference, seq) in self.known:
            return self.known[reference, seq]
        namespace, name = _parts(reference)
        tree = parse_json(self.store.journal.read(namespace, name, seq))
        at = datetime.fromisoformat(tree["at"])
        return Event(
            namespace, name, seq, tree["kind"], tree["version"], tree["tag"], at, tree["actor"], tree["payload"]
        )


def read_histories(
    store: Store,
    *,
    instead: Callable[[str, int], Event | None] = lambda _reference, _seq: None,
    last: Mapping[str, int] | None = None,
) -> Histories:
    """Reads the whole journal once.

    Args:
        instead: gives an event that somebody else knows, by name and seq, where its entry is missing or damaged.
        last: seq up to which each name is followed; other names are left out. None: all there is.

    Raises:
        StorageError
    """
    found = Histories(store)
    known: dict[tuple[str, int], Event] = {}
    found.known = known
    marks: dict[str, list[tuple[datetime, str, int]]] = {}
    names = sorted(set(store.journal.names()) | {_parts(reference) for reference in last or ()})
    for namespace, name in names:
        history = History(namespace, name)
        reference = history.reference
        if last is not None and reference not in last:
            continue
        there = set(store.journal.sequence(namespace, name))
        history.newest = max(there, default=0)
        end = history.newest if last is None else last[reference]
        if 0 in there:
            history.faults.append(Fault(namespace, name, 0, "damaged", "seq begins at 1"))
        for seq in range(1, end + 1):
            try:
                event = _read(store, namespace, name, seq) if seq in there else None
                problem = Fault(namespace, name, seq, "missing", "nothing") if event is None else None
            except Corrupt as error:
                event, problem = None, Fault(namespace, name, seq, "damaged", str(error))
            if problem is not None:
                event = instead(reference, seq)
                if event is None and seq > history.newest:
                    break  # nobody knows of such an event; only a row with a wrong seq made it seem so
                history.faults.append(problem)
                if event is None:
                    break
                known[reference, seq] = event
            assert event is not None
            try:
                _follow(history, event, marks, found.named_at)
            except Corrupt as error:
                history.faults.append(Fault(namespace, name, seq, "damaged", str(error)))
                break
        found.names[reference] = history
    for digest, events in marks.items():
        found.makers[digest] = [(reference, seq) for _, reference, seq in sorted(events)]
    return found


def _parts(reference: str) -> tuple[str, str]:
    namespace, _, name = reference.partition("/")
    return namespace, name


def _read(store: Store, namespace: str, name: str, seq: int) -> Event:
    """
    Raises:
        Corrupt: no event, or that of another place.
    """
    what = f"journal/{namespace}/{name}/{seq}.json"
    try:
        registry, event = read_event(store.journal.read(namespace, name, seq), what)
    except DigestMismatch as error:
        raise Corrupt(f"its bytes have sha256 {error.actual}, and it says {error.expected}") from error
    except NotFound as error:
        raise Corrupt(f"{what} is missing") from error
    if registry != store.registry_id:
        raise Corrupt(f"it is of registry {registry}, expected {store.registry_id}")
    if (event.namespace, event.name, event.seq) != (namespace, name, seq):
        raise Corrupt(f"it is event {event.seq} of {event.namespace}/{event.name}")
    return event


def _follow(
    history: History,
    event: Event,
    marks: dict[str, list[tuple[datetime, str, int]]],
    named_at: dict[str, set[datetime]],
) -> None:
    """Takes in the next event of a name.

    Raises:
        Corrupt: it does not follow from those before it.
    """
    if history.times and event.at < history.times[-1]:
        raise Corrupt("it is older than the event before it")
    with payload_of(event):
        placement = None
        if event.kind == "pushed":
            if event.version != len(history.fates) + 1:
                raise Corrupt(f"it makes version {event.version}, expected {len(history.fates) + 1}")
            placement = Placement.from_json(event.payload["placement"])
            history.fates[event.version] = Fate("present", event.seq)
        elif event.version is None or event.version not in history.fates:
            raise Corrupt(f"it is about version {event.version}, which the name does not have yet")
        elif event.kind in ("removed", "restored", "purged"):
            fate = history.fates[event.version]
            before = {"removed": ("present",), "restored": ("removed", "purged"), "purged": ("removed",)}[event.kind]
            if fate.state not in before:
                raise Corrupt(f"{event.kind} follows {fate.state}, expected {' or '.join(before)}")
            given = event.payload.get("placement")
            if event.kind == "restored" and (given is not None) != (fate.state == "purged"):
                raise Corrupt("a placement stands in it exactly where the version was purged")
            if given is not None:
                placement = Placement.from_json(given)
                fate.placed_by = event.seq
            history.purged |= event.kind == "purged"
            fate.state = {"removed": "removed", "restored": "present", "purged": "purged"}[event.kind]
        elif event.kind == "described":
            for digest in event.payload["blobs"].values():
                named_at.setdefault(digest, set()).add(event.at)
        for digest, role in () if placement is None else placement.blobs:
            named_at.setdefault(digest, set()).add(event.at)
            if role in BROUGHT:
                marks.setdefault(digest, []).append((event.at, history.reference, event.seq))
    history.times.append(event.at)


@contextmanager
def payload_of(event: Event) -> Iterator[None]:
    """Around the reading of a payload: one of another form than its kind has is `Corrupt`."""
    try:
        yield
    except Corrupt:
        raise
    except (RegistryError, KeyError, TypeError, ValueError, AttributeError) as error:
        told = shown(f"{type(error).__name__}: {error}", 300)
        what = f"event {event.seq} of {event.namespace}/{event.name}"
        raise Corrupt(f"{what} ({event.kind}) cannot be followed: {told}") from error


def seqs_beyond(store: Store, last: Mapping[str, int]) -> dict[str, Sequence[int]]:
    """Entries of the journal that come after these, by name."""
    beyond: dict[str, Sequence[int]] = {}
    for namespace, name in store.journal.names():
        reference = f"{namespace}/{name}"
        more = [seq for seq in store.journal.sequence(namespace, name) if seq > last.get(reference, 0)]
        if more:
            beyond[reference] = more
    return beyond
