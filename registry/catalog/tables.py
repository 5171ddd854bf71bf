"""Every table of the catalog, in the normal form of docs/architecture.md. Revisions in `migrations/`
must agree with this module; `make lint` checks it, CHECK constraints included.

Composite-key tables with small rows are WITHOUT ROWID on SQLite. Digests of a blob's tensors are packed into one row:
a row a tensor takes twice the bytes and makes a push at 100,000 versions three times slower."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from registry.catalog.types import BigId, BinaryText, Digest, Moment
from registry.core.model_form import KINDS as MODULE_KINDS
from registry.core.placement import ROLES as PLACEMENT_ROLES

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id() -> Column[int]:
    return Column("id", BigId, primary_key=True, autoincrement=True)


def _ref(name: str, target: str, *, nullable: bool = False, primary_key: bool = False) -> Column[int]:
    return Column(name, BigId, ForeignKey(f"{target}.id"), nullable=nullable, primary_key=primary_key)


def _digest(name: str = "digest", *, nullable: bool = False, unique: bool = False) -> Column[str]:
    return Column(name, Digest, nullable=nullable, unique=unique)


def _at(name: str = "created_at", *, nullable: bool = False) -> Column[datetime]:
    return Column(name, Moment, nullable=nullable, comment="UTC, microseconds since 1970")


def _one_of(column: str, *values: str) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", f"{column}_known")


_LARGEST = "1.7976931348623157e308"
"""The largest finite double: SQLite knows no NaN, and PostgreSQL sorts it above Infinity."""

_WITHOUT_ROWID: dict[str, Any] = {"sqlite_with_rowid": False}

registry_meta = Table(
    "registry_meta",
    metadata,
    Column("one", Integer, primary_key=True, autoincrement=False),
    Column("registry_id", Text, nullable=False, comment="the same in the store's registry.json"),
    Column("store_format", Integer, nullable=False),
    Column("store_url", Text, comment="NULL: beside the catalog"),
    _at(),
    CheckConstraint("one = 1", "one_row"),
)

artifact = Table(
    "artifact",
    metadata,
    _id(),
    Column("namespace", BinaryText, nullable=False),
    Column("name", BinaryText, nullable=False),
    Column("last_number", Integer, nullable=False, server_default=text("0"), comment="number of the newest version"),
    Column("last_seq", BigInteger, nullable=False, server_default=text("0"), comment="seq of the newest event"),
    _at("last_event_at"),
    _at(),
    UniqueConstraint("namespace", "name"),
    CheckConstraint("length(namespace) BETWEEN 1 AND 128 AND length(name) BETWEEN 1 AND 128", "name_length"),
    CheckConstraint("last_number >= 0 AND last_seq >= 0", "counters"),
)

layout = Table(
    "layout",
    metadata,
    _id(),
    _digest(unique=True),
    Column("tensors", Integer, nullable=False),
    Column("parameters", BigInteger, nullable=False, comment="elements over all tensors"),
    Column("nbytes", BigInteger, nullable=False),
    CheckConstraint("tensors >= 0 AND parameters >= 0 AND nbytes >= 0", "sizes"),
)

layout_tensor = Table(
    "layout_tensor",
    metadata,
    _ref("layout_id", "layout", primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("name", BinaryText, nullable=False),
    Column("dtype", Text, nullable=False, comment="safetensors dtype code"),
    Column("shape", Text, nullable=False, comment="dimensions, comma-separated; empty for a scalar"),
    **_WITHOUT_ROWID,
)

target = Table(
    "target",
    metadata,
    _ref("layout_id", "layout", primary_key=True),
    Column("module", BinaryText, primary_key=True, comment="path in the base model"),
    Column("kind", Text, primary_key=True),
    Column("rank", Integer, nullable=False, comment="0 for a full copy"),
    Column("in_features", BigInteger),
    Column("out_features", BigInteger),
    Index(None, "module", "layout_id"),
    CheckConstraint("rank >= 0", "rank"),
    **_WITHOUT_ROWID,
)

architecture = Table(
    "architecture",
    metadata,
    _id(),
    _digest(unique=True),
    _digest("source_fingerprint", nullable=True),
    Column("class_name", BinaryText, comment="only ever text; NULL: unknown"),
    Column("exact", Boolean, nullable=False, comment="read from the model; else from the names of saved tensors"),
    Column("document", Text, nullable=False, comment="the whole form, canonical JSON; the digest is its own"),
)

module = Table(
    "module",
    metadata,
    _ref("architecture_id", "architecture", primary_key=True),
    Column("path", BinaryText, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("in_features", BigInteger),
    Column("out_features", BigInteger),
    Column("bias", Boolean),
    Column("tied_to", BinaryText),
    Column("groups", BigInteger, nullable=False, comment="of a convolution"),
    Column("rows", BigInteger, comment="first dimension of its weight; NULL: it has none"),
    Column("columns", BigInteger, comment="second dimension of its weight"),
    _one_of("kind", *MODULE_KINDS),
    CheckConstraint("groups >= 1", "groups"),
    **_WITHOUT_ROWID,
)

lora_config = Table(
    "lora_config",
    metadata,
    _id(),
    _digest(unique=True),
    Column("peft_type", BinaryText, nullable=False),
    Column("r", Integer),
    Column("lora_alpha", Double, comment="NULL: not recorded with the adapter"),
    Column("lora_dropout", Double),
    Column("use_rslora", Boolean),
    Column("use_dora", Boolean),
    Column("lora_bias", Boolean),
    Column("bias", BinaryText),
    Column("init_lora_weights", BinaryText),
    Column("fan_in_fan_out", Boolean),
    Column("task_type", BinaryText),
    Column("base_model", BinaryText, comment="base_model_name_or_path as recorded"),
    Column("document", Text, comment="the whole configuration, JSON; for display only"),
    CheckConstraint("r IS NULL OR r >= 0", "r"),
    Index(None, "r"),
)

lora_target = Table(
    "lora_target",
    metadata,
    _ref("lora_config_id", "lora_config", primary_key=True),
    Column("target", BinaryText, primary_key=True, comment="one entry of target_modules, or the regex"),
    Index(None, "target", "lora_config_id"),
    **_WITHOUT_ROWID,
)

blob = Table(
    "blob",
    metadata,
    _id(),
    _digest(unique=True),
    Column("size", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    _ref("layout_id", "layout", nullable=True),
    _at(),
    _one_of("state", "present", "external", "deleting"),
    CheckConstraint("size >= 0", "size"),
)

blob_tensors = Table(
    "blob_tensors",
    metadata,
    _ref("blob_id", "blob", primary_key=True),
    Column("digests", LargeBinary, nullable=False, comment="32 bytes a tensor, in the order of the blob's layout"),
    CheckConstraint("length(digests) % 32 = 0", "digests_length"),
)

tensor_index = Table(
    "tensor_index",
    metadata,
    Column("prefix", BigInteger, primary_key=True, autoincrement=False, comment="first 8 bytes of the tensor digest"),
    _ref("blob_id", "blob", primary_key=True),
    Column("ordinal", Integer, primary_key=True, autoincrement=False),
    Index(None, "blob_id"),
    **_WITHOUT_ROWID,
)

version = Table(
    "version",
    metadata,
    _id(),
    _ref("artifact_id", "artifact"),
    Column("number", Integer, nullable=False),
    _digest("manifest_digest"),
    _digest("content_digest"),
    Column("kind", BinaryText, nullable=False),
    Column("state", Text, nullable=False),
    _ref("layout_id", "layout", nullable=True),
    _ref("lora_config_id", "lora_config", nullable=True),
    _ref("architecture_id", "architecture", nullable=True),
    _ref("base_id", "version", nullable=True),
    Column("size", BigInteger, nullable=False, comment="bytes of the files as pushed"),
    Column("bytes_new", BigInteger, nullable=False, comment="bytes that the push added to the store"),
    Column("peft_version", Text, comment="that wrote the adapter; NULL: unknown"),
    Column("peft_order", BigInteger, comment="peft_version as one number, so that 0.9 < 0.18"),
    Column("torch_version", BinaryText, comment="seen at the push, like python_version and the git columns"),
    Column("python_version", BinaryText),
    Column("git_commit", BinaryText),
    Column("git_dirty", Boolean),
    Column("message", BinaryText),
    Column("created_by", BinaryText, nullable=False),
    _at(),
    UniqueConstraint("artifact_id", "number"),
    UniqueConstraint("artifact_id", "manifest_digest"),
    CheckConstraint("number >= 1", "number"),
    CheckConstraint("base_id IS NULL OR base_id < id", "base_is_older"),
    CheckConstraint("size >= 0 AND bytes_new >= 0", "sizes"),
    _one_of("kind", "adapter", "base", "checkpoint"),
    _one_of("state", "present", "removed", "purged"),
    Index(None, "base_id", "id"),
    Index(None, "lora_config_id", "id"),
    Index(None, "layout_id", "base_id", "id"),
    Index(None, "content_digest"),
    Index(None, "manifest_digest"),
    Index(None, "kind", "id"),
    Index(None, "created_at"),
)

component = Table(
    "component",
    metadata,
    _ref("version_id", "version", primary_key=True),
    Column("role", Text, primary_key=True),
    _ref("layout_id", "layout"),
    Column("digests", LargeBinary, nullable=False, comment="32 bytes a tensor, in layout order"),
    Column(
        "placement", LargeBinary, nullable=False, comment="(version_blob position, ordinal): two 32-bit words a tensor"
    ),
    Column("rounded_digests", LargeBinary, comment="digests after rounding to bf16, where casts must be recognised"),
    Column("data_position", Integer, comment="the state document; NULL: tensors alone"),
    ForeignKeyConstraint(["version_id", "data_position"], ["version_blob.version_id", "version_blob.position"]),
    CheckConstraint("length(digests) % 32 = 0 AND length(placement) * 4 = length(digests)", "lengths"),
    Index(None, "layout_id"),
)

version_blob = Table(
    "version_blob",
    metadata,
    _ref("version_id", "version", primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    _ref("blob_id", "blob"),
    Column("role", Text, nullable=False),
    Index(None, "blob_id"),
    _one_of("role", *PLACEMENT_ROLES),
    **_WITHOUT_ROWID,
)

version_file = Table(
    "version_file",
    metadata,
    _ref("version_id", "version", primary_key=True),
    Column("path", BinaryText, primary_key=True),
    _digest("sha256"),
    Column("size", BigInteger, nullable=False),
    Column("role", Text, comment="component that the file carries"),
    Column("blob_position", Integer, nullable=False, comment="the file, or the header of a safetensors file"),
    Column("whole", Boolean, nullable=False),
    Column("splices", Text, comment="tensors within a skeleton, JSON as in a placement; NULL: none, or the component"),
    ForeignKeyConstraint(["version_id", "blob_position"], ["version_blob.version_id", "version_blob.position"]),
    Index(None, "sha256"),
    CheckConstraint("size >= 0", "size"),
    CheckConstraint("splices IS NULL OR (NOT whole AND role IS NULL)", "splices_of_skeleton"),
    **_WITHOUT_ROWID,
)

tag = Table(
    "tag",
    metadata,
    _ref("artifact_id", "artifact", primary_key=True),
    Column("name", BinaryText, primary_key=True),
    _ref("version_id", "version"),
    Column("protected", Boolean, nullable=False, server_default=text("false")),
    _at("moved_at"),
    CheckConstraint("name <> 'latest'", "latest_is_derived"),
    CheckConstraint("length(name) BETWEEN 1 AND 128", "name_length"),
    Index(None, "name", "version_id"),
    Index(None, "version_id"),
    **_WITHOUT_ROWID,
)

event = Table(
    "event",
    metadata,
    _ref("artifact_id", "artifact", primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", Text, nullable=False),
    _ref("version_id", "version", nullable=True),
    Column("tag", BinaryText),
    _at("at"),
    Column("actor", Text, nullable=False),
    Column("payload", Text, nullable=False, comment="JSON; its form is a matter of the kind, see docs/format.md"),
    CheckConstraint("seq >= 1", "seq"),
    _one_of(
        "kind",
        "pushed",
        "described",
        "tag_moved",
        "tag_protected",
        "tag_unprotected",
        "tag_deleted",
        "metadata",
        "metrics",
        "note",
        "removed",
        "restored",
        "purged",
    ),
    Index(None, "version_id", "seq"),
    Index("ix_event_tag", "artifact_id", "tag", "seq"),
)

described_blob = Table(
    "described_blob",
    metadata,
    Column("artifact_id", BigId, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("role", Text, primary_key=True, comment="probe, live_names, history, ..."),
    _ref("blob_id", "blob"),
    ForeignKeyConstraint(["artifact_id", "seq"], ["event.artifact_id", "event.seq"]),
    Index(None, "blob_id"),
    comment="blobs that a described event names; gc keeps them",
    **_WITHOUT_ROWID,
)

outbox = Table(
    "outbox",
    metadata,
    Column("artifact_id", BigId, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    ForeignKeyConstraint(["artifact_id", "seq"], ["event.artifact_id", "event.seq"]),
    comment="events whose journal object is still to be written",
    **_WITHOUT_ROWID,
)

lineage = Table(
    "lineage",
    metadata,
    _ref("child_id", "version", primary_key=True),
    _ref("parent_id", "version", primary_key=True),
    Column("relation", Text, primary_key=True),
    Column("weight", Double),
    CheckConstraint("parent_id < child_id", "no_cycle"),
    CheckConstraint("weight IS NULL OR relation = 'merged_from'", "weight_of_merge"),
    _one_of("relation", "trained_on", "continued_from", "merged_from", "extracted_from", "converted_from"),
    Index(None, "parent_id"),
    **_WITHOUT_ROWID,
)

version_metadata = Table(
    "metadata",
    metadata,
    _ref("version_id", "version", primary_key=True),
    Column("key", BinaryText, primary_key=True),
    Column("text_value", BinaryText, nullable=False),
    Column("number_value", Double, comment="set where the value is a number, and compared as such"),
    CheckConstraint("length(key) BETWEEN 1 AND 128 AND length(text_value) <= 500", "lengths"),
    Index(None, "key", "number_value", "version_id"),
    Index(None, "key", "text_value", "version_id"),
    **_WITHOUT_ROWID,
)

metric = Table(
    "metric",
    metadata,
    _ref("version_id", "version", primary_key=True),
    Column("key", BinaryText, primary_key=True),
    Column("value", Double, comment="NULL where kind is not finite: SQLite has no NaN"),
    Column("kind", Text, nullable=False),
    Column("step", BigInteger),
    _at("at"),
    _one_of("kind", "finite", "nan", "inf", "-inf"),
    CheckConstraint("(kind = 'finite') = (value IS NOT NULL)", "value_of_kind"),
    CheckConstraint("length(key) BETWEEN 1 AND 128", "key_length"),
    Index(None, "key", "kind", "value", "version_id"),
    **_WITHOUT_ROWID,
)

finding = Table(
    "finding",
    metadata,
    _ref("version_id", "version", primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("code", Text, nullable=False),
    Column("severity", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("expected", Text, nullable=False),
    Column("found", Text, nullable=False),
    Column("mend", Text, nullable=False),
    _one_of("severity", "error", "warning", "info"),
    Index(None, "code", "version_id"),
    **_WITHOUT_ROWID,
)

lease = Table(
    "lease",
    metadata,
    Column("id", Text, primary_key=True),
    Column("purpose", Text, nullable=False),
    Column("holder", Text, nullable=False, comment="host, process and user"),
    _at("acquired_at"),
    _at("expires_at"),
    CheckConstraint("expires_at > acquired_at", "order"),
    Index(None, "expires_at"),
)

for _table in metadata.tables.values():
    for _column in _table.columns:
        if isinstance(_column.type, Digest):
            _table.append_constraint(CheckConstraint(f"length({_column.name}) = 32", f"{_column.name}_length"))
        if isinstance(_column.type, Double):
            _table.append_constraint(CheckConstraint(f"abs({_column.name}) <= {_LARGEST}", f"{_column.name}_finite"))
