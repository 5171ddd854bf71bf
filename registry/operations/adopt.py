"""Adopting a tree: all adapters and checkpoints in it are pushed, bases first, each run in its order. What is in
already is passed over by its files' names, sizes and times, so an adoption that was cut off goes on where it was; what
is broken is said and stops nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from registry.catalog.adopted import VersionRow, versions_of_content
from registry.core.annotations import read_metadata
from registry.core.errors import (
    Corrupt,
    NoSpace,
    ReadOnly,
    RegistryError,
    SchemaOutOfDate,
    StoreUnreachable,
    WrongStore,
)
from registry.formats.attachments import ATTACHMENT_LIMIT
from registry.formats.origin import origin_of
from registry.formats.scan import fingerprint
from registry.operations import annotate
from registry.operations.adopt_look import Attachments, history_of, open_artifact
from registry.operations.adopt_plan import (
    FINGERPRINT,
    FROM,
    HUB_ID,
    HUB_REVISION,
    STEP,
    Plan,
    Step,
    make_plan,
    one_line,
    path_text,
    removed_why,
)
from registry.operations.adoption import Adoption, Item, Progress
from registry.operations.base_guess import BaseGuess, listed
from registry.operations.context import Context
from registry.operations.describing import Description
from registry.operations.push import push
from registry.operations.push_request import check_request

EXTERNAL_OVER = 2 << 30
_OF_THE_REGISTRY = (Corrupt, NoSpace, ReadOnly, SchemaOutOfDate, StoreUnreachable, WrongStore)
"""What is wrong with the registry is no matter of one artifact, and ends the adoption."""


def adopt(
    context: Context,
    folder: Path,
    *,
    namespace: str | None = None,
    dry_run: bool = False,
    external_over: int | None = EXTERNAL_OVER,
    keep_duplicates: bool = False,
    attachments: bool = True,
    attachment_limit: int | None = None,
    progress: Progress | None = None,
) -> Adoption:
    """Adopts a tree; see `Registry.adopt`."""
    if not dry_run:
        context.require_writable()
    told = progress or _nothing
    kept = Attachments(attachments, ATTACHMENT_LIMIT if attachment_limit is None else attachment_limit)
    plan = make_plan(context, folder, namespace=namespace, external_over=external_over, attachments=kept, progress=told)
    items = tuple(step.item for step in plan.steps)
    if not dry_run:
        items = _Work(context, plan, kept, keep_duplicates=keep_duplicates).run(told)
    return Adoption(plan.tree.root, plan.namespace, items, plan.tree.skipped, plan.tree.counted, dry_run)


def _nothing(phase: str, done: int, total: int, path: str) -> None: ...


class _SameContent(Exception):
    """The content is in the registry, as these versions."""

    def __init__(self, rows: list[VersionRow]) -> None:
        super().__init__(rows[0].reference)
        self.rows = rows


class _WasRemoved(Exception):
    """The version that it would be again was removed."""

    def __init__(self, row: VersionRow) -> None:
        super().__init__(row.reference)
        self.row = row


class _Work:
    """Does a plan, one item after another."""

    def __init__(self, context: Context, plan: Plan, attachments: Attachments, *, keep_duplicates: bool) -> None:
        self._context = context
        self._plan = plan
        self._attachments = attachments
        self._keep_duplicates = keep_duplicates
        self._references: dict[str, str] = {}
        """By path: the version that holds what lies there."""
        self._before: dict[tuple[str, ...], Step] = {}
        """By run: the last step that is in."""

    def run(self, progress: Progress) -> tuple[Item, ...]:
        done = []
        for number, step in enumerate(self._plan.steps):
            progress("push", number, len(self._plan.steps), step.item.path)
            item = self._do(step) if step.item.verdict == "new" else step.item
            if item.reference is not None and item.verdict != "left out":
                self._references[item.path] = item.reference
                self._before[step.run] = step
            done.append(item)
        progress("push", len(self._plan.steps), len(self._plan.steps), "")
        return tuple(done)

    def _do(self, step: Step) -> Item:
        base, why = self._base(step.item.guess)
        item = replace(step.item, base=base, why=why)
        parent = self._parent(step)
        try:
            return self._push(step, replace(item, continued_from=parent))
        except _SameContent as same:
            return self._as_duplicate(step, item, same.rows)
        except _WasRemoved as removed:
            row = removed.row
            return replace(item, base=row.base, verdict="left out", reference=row.reference, why=removed_why(row))
        except _OF_THE_REGISTRY:
            raise
        except RegistryError as error:
            return replace(item, base=None, verdict="broken", why=one_line(error, self._plan.tree.root))

    def _push(self, step: Step, item: Item) -> Item:
        request = check_request(
            item.name,
            base=item.base,
            metadata=self._metadata(step),
            parents=[] if item.continued_from is None else [("continued_from", item.continued_from, None)],
            external=item.external,
            force=True,  # what is there is taken as it is, with its findings
        )
        source = open_artifact(step.artifact, self._attachments)
        source.origin = origin_of(step.artifact.place)

        def before_storing(described: Description) -> None:
            self._refuse_same(item, described)

        result = push(self._context, source, request, before_storing=before_storing)
        return replace(
            item,
            kind=result.kind,
            verdict="adopted" if result.created else "there",
            reference=result.reference,
            findings=sum(finding.severity != "info" for finding in result.findings),
            bytes_new=result.bytes_new,
            notes=result.notes,
        )

    def _metadata(self, step: Step) -> Mapping[str, object]:
        # Taken anew: files may have changed since the plan, and this is said of those that are pushed now.
        mark, _ = fingerprint(step.artifact)
        said: dict[str, object] = {FROM: path_text(step.item.path), FINGERPRINT: mark}
        if step.item.step is not None:
            said[STEP] = step.item.step
        origin = origin_of(step.artifact.place)
        said |= {key: origin[of] for key, of in ((HUB_ID, "hub_id"), (HUB_REVISION, "revision")) if of in origin}
        return said

    def _refuse_same(self, item: Item, described: Description) -> None:
        with self._context.reading() as connection:
            rows = versions_of_content(connection, described.content_digest, (FROM,))
        own = [row for row in rows if row.artifact == item.name]
        if any(row.digest == described.manifest.digest and row.state == "present" for row in own):
            return  # this very version
        present = [row for row in rows if row.state == "present"]
        if present and not self._keep_duplicates:
            raise _SameContent(present)
        gone = [row for row in own if row.state != "present" and row.metadata.get(FROM) == path_text(item.path)]
        if gone:
            raise _WasRemoved(gone[0])

    def _as_duplicate(self, step: Step, item: Item, rows: list[VersionRow]) -> Item:
        own = [row for row in rows if row.artifact == item.name and row.metadata.get(FROM) == path_text(item.path)]
        if own:
            # Only its files were touched, or more is known of its base by now: the next adoption need not read it.
            metadata = read_metadata({FINGERPRINT: self._metadata(step)[FINGERPRINT]})
            annotate.annotate(self._context, own[0].reference, metadata=metadata, metrics={}, step=None)
            return replace(item, base=own[0].base, verdict="there", reference=own[0].reference, why="")
        path = rows[0].metadata.get(FROM)
        where = f", from {path}" if path else ""
        why = f"same content as {rows[0].reference}{where}"
        return replace(
            item, name=rows[0].artifact, base=rows[0].base, verdict="duplicate", reference=rows[0].reference, why=why
        )

    def _base(self, guess: BaseGuess | None) -> tuple[str | None, str]:
        """The base to push an adapter with, and what there is to say of it."""
        if guess is None:
            return None, ""
        found = [base.reference or self._references.get(base.path or "") for base in guess.bases]
        references = list(dict.fromkeys(reference for reference in found if reference is not None))
        if guess.how in ("recorded", "fits", "undecided") and len(references) == 1:
            return references[0], guess.why if guess.how == "fits" else ""
        if guess.how == "undecided":
            return None, f"no base: {guess.why}: {listed(guess.bases)}"
        if guess.how in ("recorded", "fits"):
            return None, f"no base: {listed(guess.bases)} is not in"
        return None, f"no base: {guess.why}"

    def _parent(self, step: Step) -> str | None:
        """The checkpoint that this one continues: the one before it in its run, where the trainer's log says so."""
        before = self._before.get(step.run)
        if before is None:
            return None
        earlier, later = history_of(before.artifact), history_of(step.artifact)
        if earlier and len(earlier) < len(later) and later[: len(earlier)] == earlier:
            return self._references[before.item.path]
        return None
