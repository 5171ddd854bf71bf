"""The plan of an adoption: what lies in a tree, what of it is in already, what the rest is called, which base each
adapter has, and in which order all that is pushed. Nothing is written, and no tensor is read."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from registry.catalog import adopted
from registry.catalog.adopted import VersionRow
from registry.catalog.blobs import read_layout
from registry.catalog.descriptions import descriptions_of
from registry.core.adapter_names import Target
from registry.core.errors import RegistryError
from registry.core.layout import Layout
from registry.core.model_form import LIVE_NAMES
from registry.core.reference import parse_artifact, shown
from registry.core.run_names import RunPlace, choose_names, run_place, slug
from registry.formats.origin import origin_of
from registry.formats.scan import TENSOR_SUFFIXES, Artifact, Tree, fingerprint, scan
from registry.operations.adopt_look import Attachments, Look, NoArtifact, look_at, open_artifact
from registry.operations.adoption import Item, Progress
from registry.operations.base_fit import live_names_by_component
from registry.operations.base_guess import Base, BaseGuesser, path_parts
from registry.operations.context import Context

FROM, FINGERPRINT, STEP = "adopted_from", "adopted_fingerprint", "step"
HUB_ID, HUB_REVISION = "hub_id", "hub_revision"
"""Keys of the metadata that an adopted version has."""
MOST_PATH = 500


@dataclass(frozen=True)
class Step:
    """One item of a plan, with what is needed to do it.

    Attributes:
        run: the parts of its path that say which run it is of.
        order: its place there.
        fingerprint: of its files as they were found.
    """

    item: Item
    artifact: Artifact
    run: tuple[str, ...]
    order: tuple[bool, int, int, bool, str]
    fingerprint: str
    look: Look | None = None


@dataclass(frozen=True)
class Plan:
    """What an adoption would do.

    Attributes:
        steps: bases first, then run by run, each in its order.
    """

    tree: Tree
    namespace: str
    steps: tuple[Step, ...]


def namespace_of(root: Path, given: str | None) -> str:
    """The namespace that was given, or one by the name of the folder.

    Raises:
        InvalidReference
    """
    namespace = slug(Path(os.path.realpath(root)).name or "adopted") if given is None else given
    parse_artifact(f"{namespace}/x", what=namespace)
    return namespace


def make_plan(
    context: Context,
    root: Path,
    *,
    namespace: str | None = None,
    external_over: int | None,
    attachments: Attachments,
    progress: Progress,
) -> Plan:
    """Plans the adoption of a tree.

    Raises:
        SourceNotFound, InvalidInput, StorageError: of the tree itself; InvalidReference: of the namespace.
    """
    namespace = namespace_of(root, namespace)
    tree = scan(root, on_folder=lambda path: progress("scan", 0, 0, path))
    with context.reading() as connection:
        rows = adopted.versions_with(connection, namespace, FROM, (FINGERPRINT, STEP))
        names = adopted.names_in(connection, namespace)
        stored = _StoredBases(context, adopted.bases(connection, (FROM, HUB_ID, HUB_REVISION)))
    planner = _Planner(context, tree, namespace, rows, external_over, attachments)
    for number, artifact in enumerate(tree.artifacts):
        progress("look", number, len(tree.artifacts), artifact.path)
        planner.add(artifact)
    return Plan(tree, namespace, planner.finish(names, stored))


def path_text(path: str) -> str:
    """A path as metadata keeps it: its end, where it is too long."""
    text = path.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= MOST_PATH else f"...{text[len(text) - MOST_PATH + 3 :]}"


class _Planner:
    def __init__(
        self,
        context: Context,
        tree: Tree,
        namespace: str,
        rows: Sequence[VersionRow],
        external_over: int | None,
        attachments: Attachments,
    ) -> None:
        self._context = context
        self._root = tree.root
        self._namespace = namespace
        self._external_over = external_over
        self._attachments = attachments
        self._rows: dict[str, list[VersionRow]] = {}
        for row in rows:
            self._rows.setdefault(row.metadata[FROM], []).append(row)
        self._steps: list[Step] = []
        self._targets: dict[tuple[Target, ...], tuple[Target, ...]] = {}

    # ---- one artifact

    def add(self, artifact: Artifact) -> None:
        """Takes in one artifact: what it is, unless it is in already."""
        place = self._place(artifact.path)
        item = Item(artifact.path, artifact.form, None, "", place.step, 0)
        mark, look = "", None
        try:
            mark, size = fingerprint(artifact)
            item = replace(item, size=size)
            known = self._known(artifact.path, mark)
            if known is not None:
                item = _as_known(item, known)
                if item.verdict == "there" and item.kind == "adapter" and item.base is None:
                    look = self._interned(look_at(artifact, self._attachments))
            else:
                look = self._interned(look_at(artifact, self._attachments))
                item = replace(item, kind=look.kind, external=self._is_external(look, size))
        except NoArtifact as reason:
            item = replace(item, verdict="left out", why=one_line(reason, self._root))
        except RegistryError as error:
            item = replace(item, verdict="broken", why=one_line(error, self._root))
        said = place
        if look is not None:
            step = look.step if place.step is None else place.step
            epoch = int(look.epoch) if place.epoch is None and look.epoch is not None else place.epoch
            said = replace(place, step=step, epoch=epoch)
            item = replace(item, step=step)
        elif place.step is None and item.step is not None:
            said = replace(place, step=item.step)
        # Where a path has no number, the run's own folder, there is what came out at its end.
        is_end = place.order[0]
        order = (is_end, *said.order[1:], _is_main(artifact.place), artifact.path)
        self._steps.append(Step(item, artifact, place.run, order, mark, look))

    def _place(self, path: str) -> RunPlace:
        return run_place(_parts(self._root, path))

    def _known(self, path: str, mark: str) -> VersionRow | None:
        same = [row for row in self._rows.get(path_text(path), ()) if row.metadata.get(FINGERPRINT) == mark]
        return min(same, key=lambda row: (row.state != "present", row.number), default=None)

    def _is_external(self, look: Look, size: int) -> bool:
        limit = self._external_over
        return limit is not None and look.kind == "base" and look.can_be_external and size > limit

    def _interned(self, look: Look) -> Look:
        """Hundreds of adapters of one recipe share their targets."""
        return replace(look, targets=self._targets.setdefault(look.targets, look.targets))

    # ---- all of them

    def finish(self, names: Collection[str], stored: _StoredBases) -> tuple[Step, ...]:
        """Names, bases and the order."""
        given: dict[tuple[str, ...], str] = {}
        for path, rows in sorted(self._rows.items()):
            given.setdefault(self._place(path).run, rows[0].name)
        runs = {step.run for step in self._steps if step.item.verdict in ("new", "there")}
        chosen = choose_names(
            runs, default=slug(self._root.name or "adopted"), given=given, taken={*names} - {*given.values()}
        )
        guesser = BaseGuesser(self._bases(stored), self._root)
        finished = [self._finished(step, chosen, guesser) for step in self._steps]
        return tuple(sorted(finished, key=_turn))

    def _finished(self, step: Step, names: Mapping[tuple[str, ...], str], guesser: BaseGuesser) -> Step:
        item, look = step.item, step.look
        if item.verdict == "new":
            item = replace(item, name=f"{self._namespace}/{names[step.run]}")
        if look is not None and look.kind == "adapter":
            folder = step.artifact.place.parent if step.artifact.form == "file" else step.artifact.place
            item = replace(item, guess=guesser.guess(look.recorded, look.revision, look.targets, folder))
        if item.verdict == "there" and item.guess is not None and item.guess.how in ("recorded", "fits"):
            label = shown(item.guess.bases[0].label, 120)
            item = replace(item, why=f"it has no base, and by now there is {label}: push it again with --base")
        return replace(step, item=item)

    def _bases(self, stored: _StoredBases) -> list[Base]:
        """Those of the tree, and those of the registry that are not among them."""
        found, seen = [], set()
        for step in self._steps:
            if step.item.reference is not None and step.item.kind == "base":
                seen.add(step.item.reference)
                found.append(stored.base(step.item.reference, self._tree_base(step)))
            elif step.look is not None and step.look.kind == "base":
                found.append(self._tree_base(step))
        found += [stored.base(reference) for reference in stored.references if reference not in seen]
        return found

    def _tree_base(self, step: Step) -> Base:
        artifact = step.artifact
        origin = origin_of(artifact.place)
        parts = path_parts(str(artifact.place))
        called = [parts, path_parts(origin.get("hub_id", ""))]
        if artifact.form == "file":
            called.append((*parts[:-1], Path(parts[-1]).stem))
        look = step.look
        return Base(
            path=artifact.path,
            reference=None,
            place=os.path.realpath(artifact.place),
            called=tuple(called),
            hub_id=origin.get("hub_id"),
            revision=origin.get("revision"),
            layouts=lambda: look.layouts if look else {},
            live_names=lambda: _asked_live_names(artifact),
        )


def _as_known(item: Item, row: VersionRow) -> Item:
    """An item that is in already."""
    step = row.metadata.get(STEP, "")
    item = replace(item, kind=row.kind, name=row.artifact, base=row.base, reference=row.reference, verdict="there")
    if item.step is None and step.isdecimal():
        item = replace(item, step=int(step))
    if row.state == "present":
        return item
    return replace(item, verdict="left out", why=removed_why(row))


def removed_why(row: VersionRow) -> str:
    """What there is to say of an artifact whose version was taken away."""
    return f"{row.reference} was this, and was {row.state}; push it by hand to have it back"


def one_line(error: Exception, root: Path) -> str:
    """What an error says, with paths relative to the tree."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [type(error).__name__])[0].replace(f"{root}{os.sep}", "")


def _turn(step: Step) -> tuple[object, ...]:
    """Bases first; then runs by their names, each in its order; what is not pushed stands with its run."""
    return (step.item.kind != "base", step.run, step.order)


def _parts(root: Path, path: str) -> tuple[str, ...]:
    """The parts of a path that run and step are read from: of a file without its suffix, of a hub cache with the
    model's own name in the place of its folders."""
    parts = [] if path == "." else path.split("/")
    if parts and parts[-1].lower().endswith(TENSOR_SUFFIXES):
        parts[-1] = os.path.splitext(parts[-1])[0]
    origin = origin_of(root / path)
    if "hub_id" not in origin:
        return tuple(parts)
    whole = (*root.parts, *parts)
    at = next(place for place, part in enumerate(whole) if part == "snapshots" and place and place + 1 < len(whole))
    before = whole[len(root.parts) : max(at - 1, len(root.parts))]
    return (*before, *origin["hub_id"].split("/"), *whole[max(at + 2, len(root.parts)) :])


def _is_main(place: Path) -> bool:
    """Whether it is of the revision that a hub cache calls main: of several the one that was fetched last."""
    revision = origin_of(place).get("revision")
    if revision is None:
        return False
    snapshots = next(folder for folder in (place, *place.parents) if folder.name == revision).parent
    try:
        return (snapshots.parent / "refs" / "main").read_text("ascii").strip() == revision
    except (OSError, ValueError):
        return False


def _asked_live_names(artifact: Artifact) -> Mapping[str, Mapping[str, object]]:
    if artifact.form != "model":
        return {}
    try:
        with open_artifact(artifact, Attachments(keep=False)) as source:
            document = source.described_later[LIVE_NAMES]().data
    except RegistryError:
        return {}  # its own push says why
    return live_names_by_component(document) if document else {}


class _StoredBases:
    """The bases of the registry; their layouts are read when they are asked for, each once."""

    def __init__(self, context: Context, rows: Iterable[VersionRow]) -> None:
        self._context = context
        self._rows = {row.reference: row for row in rows}
        self._of_version: dict[int, dict[str, int]] | None = None
        self._layouts: dict[int, Layout] = {}

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(self._rows)

    def base(self, reference: str, in_tree: Base | None = None) -> Base:
        """One of them; with what its copy in the tree is called as well."""
        row = self._rows.get(reference)
        said = row.metadata if row else {}
        called = [path_parts(reference.partition("@")[0]), path_parts(said.get(FROM, ""))]
        return Base(
            path=in_tree.path if in_tree else None,
            reference=reference,
            place=in_tree.place if in_tree else None,
            called=(*called, *(in_tree.called if in_tree else ())),
            hub_id=said.get(HUB_ID),
            revision=said.get(HUB_REVISION),
            layouts=lambda: self._read_layouts(row.id) if row else {},
            live_names=lambda: self._read_live_names(row.id) if row else {},
        )

    def _read_layouts(self, version_id: int) -> dict[str, Layout]:
        with self._context.reading() as connection:
            if self._of_version is None:
                ids = [row.id for row in self._rows.values()]
                self._of_version = adopted.layouts_of_versions(connection, ids)
            found = {}
            for role, layout_id in self._of_version.get(version_id, {}).items():
                if layout_id not in self._layouts:
                    self._layouts[layout_id] = read_layout(connection, layout_id)
                found[role] = self._layouts[layout_id]
        return found

    def _read_live_names(self, version_id: int) -> Mapping[str, Mapping[str, object]]:
        with self._context.reading() as connection:
            digest = descriptions_of(connection, version_id).get(LIVE_NAMES)
        if digest is None:
            return {}
        with self._context.store.blobs.open(digest) as file:
            return live_names_by_component(file.read())
