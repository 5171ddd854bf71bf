"""The rows of a new version: one function, called within the transaction that holds its name's lock."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

import rfc8785
from sqlalchemy import Connection, insert

from registry.catalog import tables
from registry.catalog.blobs import NewBlob, hold_blobs, register_blobs, register_layouts
from registry.catalog.conditions import version_order
from registry.catalog.lineage import add_edges, references
from registry.catalog.names import LockedName
from registry.catalog.removal import hold_present, restore
from registry.catalog.rows import batches, ids_by_digest, insert_missing
from registry.catalog.versions import VersionKey
from registry.core.adapter_config import adapter_config
from registry.core.adapter_names import Target, targets_of
from registry.core.digest import pack_digests
from registry.core.errors import InvalidQuery
from registry.core.event import Event
from registry.core.findings import Finding
from registry.core.layout import Layout
from registry.core.manifest import Manifest
from registry.core.placement import FilePlacement, Placement, pack_entries, splices_to_json

PUSHED_AGAIN = "pushed again"
"""Why a version came back that was removed."""
MAIN_ROLES = ("adapter", "model")
"""The component whose layout is the version's own: the first of these that it has."""


@dataclass(frozen=True)
class NewVersion:
    """Everything that a version's rows say.

    Attributes:
        parents: (relation, row id, weight); the base comes as `base_id` and becomes `trained_on` by itself.
        environment: what was captured at the push, see docs/format.md.
        peft_version: that wrote the adapter; None: unknown.
        nonfinite: positions of tensors with NaN or Inf by component: only who reads the weights can know. None for an
            event of the first program, which recorded neither this nor the origin.
        origin: where the artifact came from, as far as that is known.
        moved: where its bytes lie, if a later event of the journal says something else than `placement`.
        beside: blobs that are about to describe it. They are held with its own before anything is registered, so that
            all are locked in the order of their digests, as `gc` does it.
        purged: `gc` took its bytes; of its blobs only the manifest and the layouts are needed.
    """

    manifest: Manifest
    content_digest: str
    layouts: Mapping[str, Layout]
    targets: Sequence[Target]
    placement: Placement
    blobs: Sequence[NewBlob]
    base_id: int | None
    parents: Sequence[tuple[str, int, float | None]]
    bytes_new: int
    peft_version: str | None
    environment: Mapping[str, Any]
    message: str | None
    findings: Sequence[Finding]
    nonfinite: Mapping[str, Sequence[int]] | None
    origin: Mapping[str, str] | None
    created_by: str
    created_at: datetime
    moved: Placement | None = None
    purged: bool = False
    beside: Sequence[NewBlob] = ()

    @property
    def main(self) -> str | None:
        """The component whose layout is the version's own."""
        return next((role for role in MAIN_ROLES if role in self.layouts), None)

    @property
    def kept(self) -> tuple[tuple[int, str, str], ...]:
        """(position, digest, role) of the blobs that it needs."""
        blobs = (self.placement if self.moved is None else self.moved).blobs
        staying = {self.manifest.digest, *(part.layout for part in self.manifest.components)}
        return tuple(
            (position, digest, role)
            for position, (digest, role) in enumerate(blobs)
            if not self.purged or digest in staying
        )


def insert_version(name: LockedName, new: NewVersion) -> VersionKey:
    """Gives the version its number and inserts all of its rows and its `pushed` event.

    Raises:
        InUse: gc is deleting one of its blobs.
        VersionNotFound: its base or a parent was removed meanwhile.
        LineageCycle
    """
    connection = name.connection
    at = name.time_of_event(new.created_at)
    # Shared rows first and in the order of their digests, so that two pushes never wait for each other in a ring.
    layout_ids = register_layouts(connection, _layouts(new))
    config_id = _register_config(connection, new)
    hold_blobs(connection, [*new.blobs, *new.beside])
    blob_ids = register_blobs(connection, new.blobs, layout_ids, at)
    hold_present(connection, [parent_id for _, parent_id, _ in new.parents] + ([new.base_id] if new.base_id else []))
    number = name.next_number()
    main = new.main
    row_id = connection.execute(
        insert(tables.version)
        .values(
            artifact_id=name.id,
            number=number,
            manifest_digest=new.manifest.digest,
            content_digest=new.content_digest,
            kind=new.manifest.kind,
            state="present",
            layout_id=None if main is None else layout_ids[new.layouts[main].digest],
            lora_config_id=config_id,
            base_id=new.base_id,
            size=sum(file.size for file in new.manifest.files),
            bytes_new=new.bytes_new,
            peft_version=new.peft_version,
            peft_order=_order(new.peft_version),
            torch_version=new.environment.get("torch_version"),
            python_version=new.environment.get("python_version"),
            git_commit=new.environment.get("git_commit"),
            git_dirty=new.environment.get("git_dirty"),
            message=new.message,
            created_by=new.created_by,
            created_at=at,
        )
        .returning(tables.version.c.id)
    ).scalar_one()
    key = VersionKey(row_id, name.id, number, new.manifest.digest)
    _insert_parts(connection, key.id, new, layout_ids, blob_ids)
    edges = [*new.parents] if new.base_id is None else [("trained_on", new.base_id, None), *new.parents]
    add_edges(connection, key.id, edges)
    _insert_findings(connection, key.id, new.findings)
    named = references(connection, [parent_id for _, parent_id, _ in edges])
    payload: dict[str, Any] = {
        "manifest": new.manifest.digest,
        "content": new.content_digest,
        # The manifest has digests, and one digest may be versions of several names.
        "base": None if new.base_id is None else named[new.base_id],
        "parents": [named[parent_id] for _, parent_id, _ in new.parents],
        "environment": dict(new.environment),
        "peft_version": new.peft_version,
        "message": new.message,
        "bytes_new": new.bytes_new,
        "placement": new.placement.to_json(),
    }
    if new.nonfinite is not None:
        payload["nonfinite"] = {role: list(positions) for role, positions in new.nonfinite.items()}
        payload["origin"] = None if new.origin is None else dict(new.origin)
    name.append("pushed", payload, actor=new.created_by, at=at, version=(key.id, number))
    return key


def put_back(name: LockedName, version: VersionKey, new: NewVersion) -> Event | None:
    """Brings a purged version back under its number, with the bytes that a push has stored again. One that was brought
    back meanwhile stays as it is.

    Returns:
        The event, or None where it is present.

    Raises:
        InUse: gc is deleting one of its blobs.
        VersionNotFound: its base or a parent is removed.
    """
    at = name.time_of_event(new.created_at)
    layout_ids = register_layouts(name.connection, _layouts(new))
    hold_blobs(name.connection, [*new.blobs, *new.beside])
    blob_ids = register_blobs(name.connection, new.blobs, layout_ids, at)
    placement = new.placement.to_json()
    event = restore(name, version, actor=new.created_by, at=at, why=PUSHED_AGAIN, placement=placement)
    if event is not None and event.payload["placement"] is not None:
        _insert_parts(name.connection, version.id, new, layout_ids, blob_ids)
    return event


def _layouts(new: NewVersion) -> list[tuple[Layout, Sequence[Target]]]:
    wanted: list[tuple[Layout, Sequence[Target]]] = []
    for role, layout in new.layouts.items():
        if new.purged and role != new.main:
            continue
        # A layout's rows are shared by versions with different configs, so they follow from the names alone.
        wanted.append((layout, targets_of(layout, None)[0] if role == "adapter" else ()))
    known = {layout.digest for layout, _ in wanted}
    wanted += [(blob.layout, ()) for blob in new.blobs if blob.layout is not None and blob.layout.digest not in known]
    return wanted


def _insert_parts(
    connection: Connection,
    version_id: int,
    new: NewVersion,
    layout_ids: Mapping[str, int],
    blob_ids: Mapping[str, int],
) -> None:
    for batch in batches(new.kept):
        connection.execute(
            insert(tables.version_blob),
            [
                {"version_id": version_id, "position": position, "blob_id": blob_ids[digest], "role": role}
                for position, digest, role in batch
            ],
        )
    if new.purged:
        return
    placement = new.placement if new.moved is None else new.moved
    positions = {digest: position for position, (digest, _) in enumerate(placement.blobs)}
    connection.execute(
        insert(tables.component),
        [
            {
                "version_id": version_id,
                "role": part.role,
                "layout_id": layout_ids[part.layout],
                "digests": pack_digests(part.tensors),
                "placement": pack_entries(placement.components[part.role]),
                "data_position": None if part.data is None else positions[part.data],
            }
            for part in new.manifest.components
        ],
    )
    for files in batches(new.manifest.files):
        connection.execute(
            insert(tables.version_file),
            [
                {
                    "version_id": version_id,
                    "path": file.path,
                    "sha256": file.sha256,
                    "size": file.size,
                    "role": file.component,
                    "blob_position": placement.files[file.path].blob,
                    "whole": placement.files[file.path].whole,
                    "splices": _splices(placement.files[file.path]),
                }
                for file in files
            ],
        )


def _splices(file: FilePlacement) -> str | None:
    return None if file.splices is None else json.dumps(splices_to_json(file.splices), separators=(",", ":"))


def _insert_findings(connection: Connection, version_id: int, findings: Sequence[Finding]) -> None:
    for batch in batches(enumerate(findings)):
        connection.execute(
            insert(tables.finding),
            [
                {
                    "version_id": version_id,
                    "position": position,
                    "code": finding.code,
                    "severity": finding.severity,
                    "subject": finding.subject,
                    "message": finding.message,
                    "expected": finding.expected,
                    "found": finding.found,
                    "mend": finding.mend,
                }
                for position, finding in batch
            ],
        )


def _register_config(connection: Connection, new: NewVersion) -> int | None:
    """Row id of the adapter's configuration, made from the manifest's; of one made from the shapes where none came
    with an adapter."""
    if new.manifest.config is None and new.manifest.kind != "adapter":
        return None
    row: dict[str, Any]
    if new.manifest.config is None:
        ranks = {target.rank for target in new.targets if target.rank}
        row = {"peft_type": "LORA" if ranks else "UNKNOWN", "r": ranks.pop() if len(ranks) == 1 else None}
        identity: dict[str, Any] = {"without_config": True, **row}
        targets: tuple[str, ...] = ()
    else:
        config = adapter_config(dict(new.manifest.config))
        row = {
            "peft_type": config.peft_type,
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
            "use_dora": config.use_dora,
            "lora_bias": config.lora_bias,
            "bias": config.bias,
            "init_lora_weights": config.init_lora_weights,
            "fan_in_fan_out": config.fan_in_fan_out,
            "task_type": config.task_type,
            "base_model": config.base_model,
            "document": json.dumps(config.document, sort_keys=True),
        }
        identity = {"config": dict(new.manifest.config)}
        given = config.target_modules
        targets = (given,) if isinstance(given, str) else tuple(given or ())
    digest = sha256(rfc8785.dumps(identity)).hexdigest()
    known = ids_by_digest(connection, tables.lora_config, [digest])
    if digest in known:
        return known[digest]
    insert_missing(connection, tables.lora_config, [{"digest": digest, **row}])
    config_id = ids_by_digest(connection, tables.lora_config, [digest])[digest]
    for batch in batches(dict.fromkeys(targets)):
        insert_missing(
            connection, tables.lora_target, [{"lora_config_id": config_id, "target": target} for target in batch]
        )
    return config_id


def _order(version: str | None) -> int | None:
    if version is None:
        return None
    try:
        return version_order(version)
    except InvalidQuery:
        # A recorded version that is no version stays visible as text and compares as unknown.
        return None
