"""Replaying journals into an empty catalog: the events of all names in the order of their times, a version after those
that it came from. Each goes through the very function that made it, and must come out as it stands in the journal."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sqlalchemy import Connection, update
from sqlalchemy.exc import IntegrityError

from registry.catalog import annotation_rows, insertion, tags
from registry.catalog.blobs import NewBlob
from registry.catalog.descriptions import add_descriptions
from registry.catalog.forms import read_form, register_form
from registry.catalog.names import LockedName, lock_name
from registry.catalog.rows import batches
from registry.catalog.tables import version as version_table
from registry.catalog.versions import VersionKey
from registry.compat.case import ModelSide, Weights
from registry.core.annotations import MetadataValue, check_key, check_step, check_text, read_metrics
from registry.core.errors import Conflict, Corrupt, InvalidInput, NotFound, StorageError
from registry.core.event import Event, number_from_json
from registry.core.model_form import ModelForm
from registry.core.reference import shown
from registry.operations.histories import Histories, History, payload_of
from registry.operations.holdings import Holdings
from registry.operations.model_forms import MODEL, ROLES, recorded_form
from registry.operations.recorded import Recorder
from registry.operations.sides import files_of


@dataclass(frozen=True)
class Stop:
    """Where the rebuilding of a name ended.

    Attributes:
        seq: of the first event that is not in the catalog.
        version: number of the version that this event is about, as far as it is known.
        why: one line.
        blamed: another name that it came from, where the fault lies there.
    """

    name: str
    seq: int
    version: int | None
    why: str
    blamed: str | None = None

    def __str__(self) -> str:
        return f"{self.name} ends before its event {self.seq}: {self.why}"


@dataclass
class Replayed:
    """What a replay did.

    Attributes:
        stops: names that could not be followed to their end.
        unreadable: blobs that were missing or unreadable, with the reason; others told what had to be known of them.
    """

    names: int = 0
    events: int = 0
    versions: int = 0
    stops: list[Stop] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


def replay(
    connection: Connection,
    histories: Histories,
    holdings: Holdings,
    *,
    check_content: bool = False,
) -> Replayed:
    """Fills a catalog that has no names, within the caller's transaction.

    A name whose journal cannot be followed ends before the event that cannot; so do those that came from what is then
    missing. The caller decides whether that will do.

    Args:
        check_content: work all content digests out again.

    Raises:
        StorageError
    """
    return _Replay(connection, histories, holdings, check_content=check_content).run()


@dataclass
class _Name:
    """A name that is being replayed: its lock, what comes next, and its versions by number.

    Attributes:
        models: digests of the layouts of those versions that are models.
        described: by version and role, digests of the documents that tell the form of its model.
    """

    history: History
    locked: LockedName | None = None
    seq: int = 1
    next: Event | None = None
    versions: dict[int, VersionKey] = field(default_factory=dict)
    models: dict[int, str] = field(default_factory=dict)
    described: dict[int, dict[str, str]] = field(default_factory=dict)


class _Replay:
    def __init__(
        self, connection: Connection, histories: Histories, holdings: Holdings, *, check_content: bool
    ) -> None:
        self._connection = connection
        self._histories = histories
        self._holdings = holdings
        self._recorder = Recorder(histories, holdings, check_content=check_content)
        self._names = {reference: _Name(history) for reference, history in histories.names.items()}
        self._waiting: dict[str, list[str]] = {}  # names by the version that they wait for
        self._registered: dict[str, bool] = {}  # blobs, and whether their tensors are known
        self._forms: dict[tuple[str | None, ...], int | None] = {}  # row ids by what they follow from
        self._read_forms: dict[int, ModelForm] = {}
        self._done = Replayed()
        self._kinds: Mapping[str, Callable[[_Name, LockedName, Event], None]] = {
            "pushed": self._pushed,
            "described": self._described,
            "tag_moved": self._tag_moved,
            "tag_protected": self._tag_protected,
            "tag_unprotected": self._tag_protected,
            "tag_deleted": self._tag_deleted,
            "metadata": self._metadata,
            "metrics": self._metrics,
            "note": self._as_it_is,
            "removed": self._as_it_is,
            "restored": self._as_it_is,
            "purged": self._as_it_is,
        }

    def run(self) -> Replayed:
        heap: list[tuple[datetime, str]] = []
        for reference in self._names:
            self._offer(heap, reference)
        while heap:
            _, reference = heapq.heappop(heap)
            name = self._names[reference]
            missing = self._missing_parent(name)
            if missing is not None:
                self._waiting.setdefault(missing, []).append(reference)
                continue
            event = name.next
            assert event is not None
            if not self._apply(name, event):
                continue
            self._done.events += 1
            name.seq += 1
            self._offer(heap, reference)
            if event.kind == "pushed":
                for other in self._waiting.pop(f"{reference}@{event.version}", ()):
                    self._offer(heap, other)
        self._stop_waiting()
        self._finish()
        self._done.unreadable = self._holdings.unreadable
        return self._done

    def _offer(self, heap: list[tuple[datetime, str]], reference: str) -> None:
        """Puts the next event of a name where it will be taken in its turn."""
        name = self._names[reference]
        if name.seq <= len(name.history.times):
            name.next = self._histories.event(reference, name.seq)
            heapq.heappush(heap, (name.next.at, reference))
        elif name.history.faults and name.history.faults[-1].seq == name.seq:
            self._done.stops.append(Stop(reference, name.seq, None, str(name.history.faults[-1])))

    def _missing_parent(self, name: _Name) -> str | None:
        """A version that the next event needs and that is not there yet."""
        event = name.next
        if event is None or event.kind != "pushed":
            return None
        base, parents = event.payload.get("base"), event.payload.get("parents")
        for one in (base, *(parents if isinstance(parents, list) else ())):
            if isinstance(one, str) and self._version(one) is None:
                return one
        return None

    def _version(self, reference: str) -> VersionKey | None:
        artifact, _, number = reference.partition("@")
        name = self._names.get(artifact)
        return name.versions.get(int(number)) if name is not None and number.isdecimal() else None

    def _apply(self, name: _Name, event: Event) -> bool:
        """Does one event; False where it cannot be, and then nothing of it was done."""
        before = None if name.locked is None else (name.locked.last_number, name.locked.last_seq)
        try:
            with self._connection.begin_nested():
                if name.locked is None:
                    history = name.history
                    name.locked = lock_name(self._connection, history.namespace, history.name, at=event.at, create=True)
                name.locked.replayed = event
                name.locked.appended.clear()
                self._kinds[event.kind](name, name.locked, event)
                if not name.locked.appended:
                    raise Corrupt(f"event {event.seq} of {name.history.reference} ({event.kind}) changes nothing")
        except StorageError:
            raise
        except (Corrupt, Conflict, NotFound, InvalidInput, IntegrityError) as error:
            words = error.orig if isinstance(error, IntegrityError) else error
            why = shown(str(words).splitlines()[0], 500)
            self._done.stops.append(Stop(name.history.reference, event.seq, event.version, why))
            self._forms.clear()  # rows that were registered for this event went with it
            self._read_forms.clear()
            if before is None:
                name.locked = None
            elif name.locked is not None:
                name.locked.last_number, name.locked.last_seq = before
                name.locked.last_event_at = name.history.times[event.seq - 2]
            return False
        return True

    def _stop_waiting(self) -> None:
        for missing, references in sorted(self._waiting.items()):
            for reference in references:
                name = self._names[reference]
                number = None if name.next is None else name.next.version
                why = f"it came from {shown(missing)}, which is not there"
                self._done.stops.append(Stop(reference, name.seq, number, why, missing.partition("@")[0]))

    def _finish(self) -> None:
        """States, which nothing above may depend on: clocks of two machines need not agree. And forms of models, which
        follow from all that describes a version."""
        states: dict[str, list[int]] = {}
        forms: dict[int, list[int]] = {}
        stopped = {stop.name for stop in self._done.stops}
        for name in self._names.values():
            if name.history.reference in stopped:
                self._close(name)
            if name.locked is None:
                continue
            name.locked.save()
            self._done.names += 1
            self._done.versions += len(name.versions)
            for number, key in name.versions.items():
                state = self._state(name, number)
                if state != "present":
                    states.setdefault(state, []).append(key.id)
                if (form_id := self._form(name, number)) is not None:
                    forms.setdefault(form_id, []).append(key.id)
        for state, ids in states.items():
            self._set(ids, state=state)
        for form_id, ids in forms.items():
            self._set(ids, architecture_id=form_id)

    def _set(self, version_ids: list[int], **values: object) -> None:
        for batch in batches(version_ids):
            self._connection.execute(update(version_table).where(version_table.c.id.in_(batch)).values(**values))

    def _form(self, name: _Name, number: int) -> int | None:
        """Row id of the form of a version's model, where it has one."""
        layout, described = name.models.get(number), name.described.get(number, {})
        key = (layout, *(described.get(role) for role in ROLES))
        if key not in self._forms:
            layouts = {} if layout is None else {MODEL: self._holdings.layout(layout)}
            kind = "adapter" if layout is None else "base"
            form = recorded_form(kind, layouts, self._holdings, described)
            self._forms[key] = None if form is None else register_form(self._connection, form)
        return self._forms[key]

    def _close(self, name: _Name) -> None:
        """Lets nobody add to a name that ends early: whoever locks it finds an entry of the journal that comes next."""
        if name.locked is None:
            history, at = name.history, datetime.fromtimestamp(0, UTC)
            name.locked = lock_name(self._connection, history.namespace, history.name, at=at, create=True)
        name.locked.last_seq = max(name.locked.last_seq, name.history.newest - 1)

    def _state(self, name: _Name, number: int) -> str:
        return name.history.fates[number].state

    # One function for each kind of event.

    def _pushed(self, name: _Name, locked: LockedName, event: Event) -> None:
        manifest = self._recorder.manifest(event)
        with payload_of(event):
            base, parents = event.payload["base"], list(event.payload["parents"])
            if (base is None) != (manifest.base is None) or len(parents) != len(manifest.parents):
                raise Corrupt("base and parents are not those of its manifest")
        base_id = None if base is None else self._parent(base, manifest.base, event)
        parent_ids = tuple(
            self._parent(one, parent.digest, event) for one, parent in zip(parents, manifest.parents, strict=True)
        )
        fate = name.history.fates[int(event.version or 0)]
        new = self._recorder.new_version(
            event,
            manifest,
            fate,
            base_id=base_id,
            parent_ids=parent_ids,
            registered=self._registered,
            model=None if base is None or manifest.kind != "adapter" else self._model(base),
        )
        key = insertion.insert_version(locked, new)
        for blob in new.blobs:
            self._registered[blob.digest] = self._registered.get(blob.digest, False) or blob.layout is not None
        name.versions[key.number] = key
        layout = next((part.layout for part in manifest.components if part.role == MODEL), None)
        if layout is not None and manifest.kind != "adapter":
            name.models[key.number] = layout

    def _model(self, base: str) -> ModelSide | None:
        """A base as the rules see it, by what has described it so far; without its weights, which are its adapters'
        own."""
        artifact, _, number = base.partition("@")
        name = self._names[artifact]
        form_id = self._form(name, int(number))
        if form_id is None:
            return None
        if form_id not in self._read_forms:
            self._read_forms[form_id] = read_form(self._connection, form_id)
        files = files_of(self._connection, name.versions[int(number)].id)
        return ModelSide(base, self._read_forms[form_id], weights=Weights(base, {}), files=files)

    def _parent(self, reference: str, digest: str | None, event: Event) -> int:
        key = self._version(reference)
        if key is None or key.digest != digest:
            what = f"event {event.seq} of {event.namespace}/{event.name}"
            raise Corrupt(f"{what}: {shown(reference)} is not the version {digest} that its manifest names")
        return key.id

    def _described(self, name: _Name, locked: LockedName, event: Event) -> None:
        with payload_of(event):
            digests = {str(role): str(digest) for role, digest in event.payload["blobs"].items()}
        blobs = {}
        for role, digest in digests.items():
            size = 0 if digest in self._registered else self._holdings.size(digest)
            if size is None:
                raise Corrupt(f"blob {digest} ({shown(role)}) is missing, and nothing else tells its size")
            blobs[role] = NewBlob(digest, size)
        key = self._of(name, event)
        add_descriptions(locked, key, blobs, actor=event.actor, at=event.at)
        deciding = {role: digest for role, digest in digests.items() if role in ROLES}
        name.described.setdefault(key.number, {}).update(deciding)
        for digest in digests.values():
            self._registered.setdefault(digest, False)

    def _tag_moved(self, name: _Name, locked: LockedName, event: Event) -> None:
        tag, why = _tag(event)
        tags.move(locked, tag, self._of(name, event), actor=event.actor, at=event.at, why=why)

    def _tag_protected(self, name: _Name, locked: LockedName, event: Event) -> None:
        tag, why = _tag(event)
        on = event.kind == "tag_protected"
        tags.protect(locked, tag, on=on, actor=event.actor, at=event.at, why=why)

    def _tag_deleted(self, name: _Name, locked: LockedName, event: Event) -> None:
        tag, why = _tag(event)
        tags.remove(locked, tag, actor=event.actor, at=event.at, why=why)

    def _metadata(self, name: _Name, locked: LockedName, event: Event) -> None:
        with payload_of(event):
            values = {
                check_key(key, "metadata"): MetadataValue(
                    check_text(value["text"], "metadata"), None if value["number"] is None else float(value["number"])
                )
                for key, value in event.payload.items()
            }
        annotation_rows.set_metadata(locked, self._of(name, event), values, actor=event.actor, at=event.at)

    def _metrics(self, name: _Name, locked: LockedName, event: Event) -> None:
        with payload_of(event):
            given = {key: number_from_json(value) for key, value in event.payload["values"].items()}
            values, step = read_metrics(given), check_step(event.payload["step"])
        annotation_rows.set_metrics(locked, self._of(name, event), values, step=step, actor=event.actor, at=event.at)

    def _as_it_is(self, name: _Name, locked: LockedName, event: Event) -> None:
        key = self._of(name, event)
        locked.append(event.kind, event.payload, actor=event.actor, at=event.at, version=(key.id, key.number))

    def _of(self, name: _Name, event: Event) -> VersionKey:
        key = name.versions.get(event.version or 0)
        if key is None:
            raise Corrupt(f"event {event.seq} of {name.history.reference} is about a version that is not there")
        return key


def _tag(event: Event) -> tuple[str, str | None]:
    with payload_of(event):
        if event.tag is None:
            raise Corrupt(f"event {event.seq} of {event.namespace}/{event.name} ({event.kind}) names no tag")
        return event.tag, event.payload["why"]
