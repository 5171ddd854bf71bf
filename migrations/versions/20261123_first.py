"""first

Revises: nothing
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261123_first"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "architecture",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("source_fingerprint", sa.LargeBinary(length=32), nullable=True),
        sa.Column("arguments", sa.Text(), nullable=True, comment="constructor arguments, JSON"),
        sa.CheckConstraint("length(digest) = 32", name=op.f("ck_architecture_digest_length")),
        sa.CheckConstraint("length(source_fingerprint) = 32", name=op.f("ck_architecture_source_fingerprint_length")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_architecture")),
        sa.UniqueConstraint("digest", name=op.f("uq_architecture_digest")),
    )
    op.create_table(
        "artifact",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("namespace", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("name", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column(
            "last_number",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="number of the newest version",
        ),
        sa.Column(
            "last_seq", sa.BigInteger(), server_default=sa.text("0"), nullable=False, comment="seq of the newest event"
        ),
        sa.Column("last_event_at", sa.BigInteger(), nullable=False, comment="UTC, microseconds since 1970"),
        sa.Column("created_at", sa.BigInteger(), nullable=False, comment="UTC, microseconds since 1970"),
        sa.CheckConstraint("last_number >= 0 AND last_seq >= 0", name=op.f("ck_artifact_counters")),
        sa.CheckConstraint(
            "length(namespace) BETWEEN 1 AND 128 AND length(name) BETWEEN 1 AND 128",
            name=op.f("ck_artifact_name_length"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_artifact")),
        sa.UniqueConstraint("namespace", "name", name=op.f("uq_artifact_namespace_name")),
    )
    op.create_table(
        "layout",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("tensors", sa.Integer(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False, comment="elements over all tensors"),
        sa.Column("nbytes", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("length(digest) = 32", name=op.f("ck_layout_digest_length")),
        sa.CheckConstraint("tensors >= 0 AND parameters >= 0 AND nbytes >= 0", name=op.f("ck_layout_sizes")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_layout")),
        sa.UniqueConstraint("digest", name=op.f("uq_layout_digest")),
    )
    op.create_table(
        "lease",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False, comment="host, process and user"),
        sa.Column("acquired_at", sa.BigInteger(), nullable=False, comment="UTC, microseconds since 1970"),
        sa.Column("expires_at", sa.BigInteger(), nullable=False, comment="UTC, microseconds since 1970"),
        sa.CheckConstraint("expires_at > acquired_at", name=op.f("ck_lease_order")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lease")),
    )
    with op.batch_alter_table("lease", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_lease_expires_at"), ["expires_at"], unique=False)

    op.create_table(
        "lora_config",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("peft_type", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("r", sa.Integer(), nullable=True),
        sa.Column("lora_alpha", sa.Double(), nullable=True, comment="NULL: not recorded with the adapter"),
        sa.Column("lora_dropout", sa.Double(), nullable=True),
        sa.Column("use_rslora", sa.Boolean(), nullable=True),
        sa.Column("use_dora", sa.Boolean(), nullable=True),
        sa.Column("lora_bias", sa.Boolean(), nullable=True),
        sa.Column("bias", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.Column("init_lora_weights", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.Column("fan_in_fan_out", sa.Boolean(), nullable=True),
        sa.Column("task_type", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.Column(
            "base_model",
            sa.Text().with_variant(sa.Text(collation="C"), "postgresql"),
            nullable=True,
            comment="base_model_name_or_path as recorded",
        ),
        sa.Column("document", sa.Text(), nullable=True, comment="the whole configuration, JSON; for display only"),
        sa.CheckConstraint("abs(lora_alpha) <= 1.7976931348623157e308", name=op.f("ck_lora_config_lora_alpha_finite")),
        sa.CheckConstraint(
            "abs(lora_dropout) <= 1.7976931348623157e308", name=op.f("ck_lora_config_lora_dropout_finite")
        ),
        sa.CheckConstraint("length(digest) = 32", name=op.f("ck_lora_config_digest_length")),
        sa.CheckConstraint("r IS NULL OR r >= 0", name=op.f("ck_lora_config_r")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lora_config")),
        sa.UniqueConstraint("digest", name=op.f("uq_lora_config_digest")),
    )
    with op.batch_alter_table("lora_config", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_lora_config_r"), ["r"], unique=False)

    op.create_table(
        "registry_meta",
        sa.Column("one", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("registry_id", sa.Text(), nullable=False, comment="the same in the store's registry.json"),
        sa.Column("store_format", sa.Integer(), nullable=False),
        sa.Column("store_url", sa.Text(), nullable=True, comment="NULL: beside the catalog"),
        sa.Column("created_at", sa.BigInteger(), nullable=False, comment="UTC, microseconds since 1970"),
        sa.CheckConstraint("one = 1", name=op.f("ck_registry_meta_one_row")),
        sa.PrimaryKeyConstraint("one", name=op.f("pk_registry_meta")),
    )
    op.create_table(
        "blob",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("layout_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False, comment="UTC, microseconds since 1970"),
        sa.CheckConstraint("state IN ('present', 'external', 'deleting')", name=op.f("ck_blob_state_known")),
        sa.CheckConstraint("length(digest) = 32", name=op.f("ck_blob_digest_length")),
        sa.CheckConstraint("size >= 0", name=op.f("ck_blob_size")),
        sa.ForeignKeyConstraint(["layout_id"], ["layout.id"], name=op.f("fk_blob_layout_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_blob")),
        sa.UniqueConstraint("digest", name=op.f("uq_blob_digest")),
    )
    op.create_table(
        "layout_tensor",
        sa.Column("layout_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False, comment="safetensors dtype code"),
        sa.Column("shape", sa.Text(), nullable=False, comment="dimensions, comma-separated; empty for a scalar"),
        sa.ForeignKeyConstraint(["layout_id"], ["layout.id"], name=op.f("fk_layout_tensor_layout_id")),
        sa.PrimaryKeyConstraint("layout_id", "position", name=op.f("pk_layout_tensor")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "lora_target",
        sa.Column("lora_config_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column(
            "target",
            sa.Text().with_variant(sa.Text(collation="C"), "postgresql"),
            nullable=False,
            comment="one entry of target_modules, or the regex",
        ),
        sa.ForeignKeyConstraint(["lora_config_id"], ["lora_config.id"], name=op.f("fk_lora_target_lora_config_id")),
        sa.PrimaryKeyConstraint("lora_config_id", "target", name=op.f("pk_lora_target")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("lora_target", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_lora_target_target_lora_config_id"), ["target", "lora_config_id"], unique=False
        )

    op.create_table(
        "module",
        sa.Column("architecture_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("path", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("in_features", sa.BigInteger(), nullable=True),
        sa.Column("out_features", sa.BigInteger(), nullable=True),
        sa.Column("bias", sa.Boolean(), nullable=True),
        sa.Column("tied_to", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.ForeignKeyConstraint(["architecture_id"], ["architecture.id"], name=op.f("fk_module_architecture_id")),
        sa.PrimaryKeyConstraint("architecture_id", "path", name=op.f("pk_module")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "target",
        sa.Column("layout_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column(
            "module",
            sa.Text().with_variant(sa.Text(collation="C"), "postgresql"),
            nullable=False,
            comment="path in the base model",
        ),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False, comment="0 for a full copy"),
        sa.Column("in_features", sa.BigInteger(), nullable=True),
        sa.Column("out_features", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("rank >= 0", name=op.f("ck_target_rank")),
        sa.ForeignKeyConstraint(["layout_id"], ["layout.id"], name=op.f("fk_target_layout_id")),
        sa.PrimaryKeyConstraint("layout_id", "module", "kind", name=op.f("pk_target")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("target", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_target_module_layout_id"), ["module", "layout_id"], unique=False)

    op.create_table(
        "version",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("artifact_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("manifest_digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("content_digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("kind", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("layout_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("lora_config_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("architecture_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("base_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=False, comment="bytes of the files as pushed"),
        sa.Column("bytes_new", sa.BigInteger(), nullable=False, comment="bytes that the push added to the store"),
        sa.Column("peft_version", sa.Text(), nullable=True, comment="that wrote the adapter; NULL: unknown"),
        sa.Column(
            "peft_order", sa.BigInteger(), nullable=True, comment="peft_version as one number, so that 0.9 < 0.18"
        ),
        sa.Column(
            "torch_version",
            sa.Text().with_variant(sa.Text(collation="C"), "postgresql"),
            nullable=True,
            comment="seen at the push, like python_version and the git columns",
        ),
        sa.Column("python_version", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.Column("git_commit", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.Column("git_dirty", sa.Boolean(), nullable=True),
        sa.Column("message", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.Column("created_by", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False, comment="UTC, microseconds since 1970"),
        sa.CheckConstraint("kind IN ('adapter', 'base', 'checkpoint')", name=op.f("ck_version_kind_known")),
        sa.CheckConstraint("state IN ('present', 'removed')", name=op.f("ck_version_state_known")),
        sa.CheckConstraint("base_id IS NULL OR base_id < id", name=op.f("ck_version_base_is_older")),
        sa.CheckConstraint("length(content_digest) = 32", name=op.f("ck_version_content_digest_length")),
        sa.CheckConstraint("length(manifest_digest) = 32", name=op.f("ck_version_manifest_digest_length")),
        sa.CheckConstraint("number >= 1", name=op.f("ck_version_number")),
        sa.CheckConstraint("size >= 0 AND bytes_new >= 0", name=op.f("ck_version_sizes")),
        sa.ForeignKeyConstraint(["architecture_id"], ["architecture.id"], name=op.f("fk_version_architecture_id")),
        sa.ForeignKeyConstraint(["artifact_id"], ["artifact.id"], name=op.f("fk_version_artifact_id")),
        sa.ForeignKeyConstraint(["base_id"], ["version.id"], name=op.f("fk_version_base_id")),
        sa.ForeignKeyConstraint(["layout_id"], ["layout.id"], name=op.f("fk_version_layout_id")),
        sa.ForeignKeyConstraint(["lora_config_id"], ["lora_config.id"], name=op.f("fk_version_lora_config_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_version")),
        sa.UniqueConstraint("artifact_id", "manifest_digest", name=op.f("uq_version_artifact_id_manifest_digest")),
        sa.UniqueConstraint("artifact_id", "number", name=op.f("uq_version_artifact_id_number")),
    )
    with op.batch_alter_table("version", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_version_base_id_id"), ["base_id", "id"], unique=False)
        batch_op.create_index(batch_op.f("ix_version_content_digest"), ["content_digest"], unique=False)
        batch_op.create_index(batch_op.f("ix_version_created_at"), ["created_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_version_kind_id"), ["kind", "id"], unique=False)
        batch_op.create_index(batch_op.f("ix_version_layout_id_id"), ["layout_id", "id"], unique=False)
        batch_op.create_index(batch_op.f("ix_version_lora_config_id_id"), ["lora_config_id", "id"], unique=False)
        batch_op.create_index(batch_op.f("ix_version_manifest_digest"), ["manifest_digest"], unique=False)

    op.create_table(
        "blob_tensors",
        sa.Column("blob_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column(
            "digests", sa.LargeBinary(), nullable=False, comment="32 bytes a tensor, in the order of the blob's layout"
        ),
        sa.CheckConstraint("length(digests) % 32 = 0", name=op.f("ck_blob_tensors_digests_length")),
        sa.ForeignKeyConstraint(["blob_id"], ["blob.id"], name=op.f("fk_blob_tensors_blob_id")),
        sa.PrimaryKeyConstraint("blob_id", name=op.f("pk_blob_tensors")),
    )
    op.create_table(
        "component",
        sa.Column("version_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("layout_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("digests", sa.LargeBinary(), nullable=False, comment="32 bytes a tensor, in layout order"),
        sa.Column(
            "placement",
            sa.LargeBinary(),
            nullable=False,
            comment="(version_blob position, ordinal): two 32-bit words a tensor",
        ),
        sa.Column(
            "rounded_digests",
            sa.LargeBinary(),
            nullable=True,
            comment="digests after rounding to bf16, where casts must be recognised",
        ),
        sa.CheckConstraint(
            "length(digests) % 32 = 0 AND length(placement) * 4 = length(digests)", name=op.f("ck_component_lengths")
        ),
        sa.ForeignKeyConstraint(["layout_id"], ["layout.id"], name=op.f("fk_component_layout_id")),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_component_version_id")),
        sa.PrimaryKeyConstraint("version_id", "role", name=op.f("pk_component")),
    )
    with op.batch_alter_table("component", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_component_layout_id"), ["layout_id"], unique=False)

    op.create_table(
        "event",
        sa.Column("artifact_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("version_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("tag", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=True),
        sa.Column("at", sa.BigInteger(), nullable=False, comment="UTC, microseconds since 1970"),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column(
            "payload", sa.Text(), nullable=False, comment="JSON; its form is a matter of the kind, see docs/format.md"
        ),
        sa.CheckConstraint(
            "kind IN ('pushed', 'described', 'tag_moved', 'tag_protected', 'tag_unprotected', 'tag_deleted', 'metadata', 'metrics', 'note', 'removed', 'restored')",
            name=op.f("ck_event_kind_known"),
        ),
        sa.CheckConstraint("seq >= 1", name=op.f("ck_event_seq")),
        sa.ForeignKeyConstraint(["artifact_id"], ["artifact.id"], name=op.f("fk_event_artifact_id")),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_event_version_id")),
        sa.PrimaryKeyConstraint("artifact_id", "seq", name=op.f("pk_event")),
    )
    with op.batch_alter_table("event", schema=None) as batch_op:
        batch_op.create_index("ix_event_tag", ["artifact_id", "tag", "seq"], unique=False)
        batch_op.create_index(batch_op.f("ix_event_version_id_seq"), ["version_id", "seq"], unique=False)

    op.create_table(
        "finding",
        sa.Column("version_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("severity", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("expected", sa.Text(), nullable=False),
        sa.Column("found", sa.Text(), nullable=False),
        sa.Column("mend", sa.Text(), nullable=False),
        sa.CheckConstraint("severity IN ('error', 'warning', 'info')", name=op.f("ck_finding_severity_known")),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_finding_version_id")),
        sa.PrimaryKeyConstraint("version_id", "position", name=op.f("pk_finding")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("finding", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_finding_code_version_id"), ["code", "version_id"], unique=False)

    op.create_table(
        "lineage",
        sa.Column("child_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("parent_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("relation", sa.Text(), nullable=False),
        sa.Column("weight", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "relation IN ('trained_on', 'continued_from', 'merged_from', 'extracted_from', 'converted_from')",
            name=op.f("ck_lineage_relation_known"),
        ),
        sa.CheckConstraint("weight IS NULL OR relation = 'merged_from'", name=op.f("ck_lineage_weight_of_merge")),
        sa.CheckConstraint("abs(weight) <= 1.7976931348623157e308", name=op.f("ck_lineage_weight_finite")),
        sa.CheckConstraint("parent_id < child_id", name=op.f("ck_lineage_no_cycle")),
        sa.ForeignKeyConstraint(["child_id"], ["version.id"], name=op.f("fk_lineage_child_id")),
        sa.ForeignKeyConstraint(["parent_id"], ["version.id"], name=op.f("fk_lineage_parent_id")),
        sa.PrimaryKeyConstraint("child_id", "parent_id", "relation", name=op.f("pk_lineage")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("lineage", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_lineage_parent_id"), ["parent_id"], unique=False)

    op.create_table(
        "metadata",
        sa.Column("version_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("key", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("text_value", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column(
            "number_value", sa.Double(), nullable=True, comment="set where the value is a number, and compared as such"
        ),
        sa.CheckConstraint("abs(number_value) <= 1.7976931348623157e308", name=op.f("ck_metadata_number_value_finite")),
        sa.CheckConstraint(
            "length(key) BETWEEN 1 AND 128 AND length(text_value) <= 500", name=op.f("ck_metadata_lengths")
        ),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_metadata_version_id")),
        sa.PrimaryKeyConstraint("version_id", "key", name=op.f("pk_metadata")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("metadata", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_metadata_key_number_value_version_id"), ["key", "number_value", "version_id"], unique=False
        )
        batch_op.create_index(
            batch_op.f("ix_metadata_key_text_value_version_id"), ["key", "text_value", "version_id"], unique=False
        )

    op.create_table(
        "metric",
        sa.Column("version_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("key", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("value", sa.Double(), nullable=True, comment="NULL where kind is not finite: SQLite has no NaN"),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.Column("at", sa.BigInteger(), nullable=False, comment="UTC, microseconds since 1970"),
        sa.CheckConstraint("(kind = 'finite') = (value IS NOT NULL)", name=op.f("ck_metric_value_of_kind")),
        sa.CheckConstraint("kind IN ('finite', 'nan', 'inf', '-inf')", name=op.f("ck_metric_kind_known")),
        sa.CheckConstraint("abs(value) <= 1.7976931348623157e308", name=op.f("ck_metric_value_finite")),
        sa.CheckConstraint("length(key) BETWEEN 1 AND 128", name=op.f("ck_metric_key_length")),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_metric_version_id")),
        sa.PrimaryKeyConstraint("version_id", "key", name=op.f("pk_metric")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("metric", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_metric_key_kind_value_version_id"), ["key", "kind", "value", "version_id"], unique=False
        )

    op.create_table(
        "tag",
        sa.Column("artifact_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("version_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("protected", sa.Boolean(), server_default=sa.text("(false)"), nullable=False),
        sa.Column("moved_at", sa.BigInteger(), nullable=False, comment="UTC, microseconds since 1970"),
        sa.CheckConstraint("name <> 'latest'", name=op.f("ck_tag_latest_is_derived")),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 128", name=op.f("ck_tag_name_length")),
        sa.ForeignKeyConstraint(["artifact_id"], ["artifact.id"], name=op.f("fk_tag_artifact_id")),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_tag_version_id")),
        sa.PrimaryKeyConstraint("artifact_id", "name", name=op.f("pk_tag")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("tag", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_tag_name_version_id"), ["name", "version_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_tag_version_id"), ["version_id"], unique=False)

    op.create_table(
        "tensor_index",
        sa.Column(
            "prefix", sa.BigInteger(), autoincrement=False, nullable=False, comment="first 8 bytes of the tensor digest"
        ),
        sa.Column("blob_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("ordinal", sa.Integer(), autoincrement=False, nullable=False),
        sa.ForeignKeyConstraint(["blob_id"], ["blob.id"], name=op.f("fk_tensor_index_blob_id")),
        sa.PrimaryKeyConstraint("prefix", "blob_id", "ordinal", name=op.f("pk_tensor_index")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("tensor_index", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_tensor_index_blob_id"), ["blob_id"], unique=False)

    op.create_table(
        "version_blob",
        sa.Column("version_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("blob_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "role IN ('tensors', 'reused', 'header', 'file', 'layout', 'manifest')",
            name=op.f("ck_version_blob_role_known"),
        ),
        sa.ForeignKeyConstraint(["blob_id"], ["blob.id"], name=op.f("fk_version_blob_blob_id")),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_version_blob_version_id")),
        sa.PrimaryKeyConstraint("version_id", "position", name=op.f("pk_version_blob")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("version_blob", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_version_blob_blob_id"), ["blob_id"], unique=False)

    op.create_table(
        "outbox",
        sa.Column(
            "artifact_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False
        ),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.ForeignKeyConstraint(
            ["artifact_id", "seq"], ["event.artifact_id", "event.seq"], name=op.f("fk_outbox_artifact_id_seq")
        ),
        sa.PrimaryKeyConstraint("artifact_id", "seq", name=op.f("pk_outbox")),
        comment="events whose journal object is still to be written",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "version_file",
        sa.Column("version_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("path", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("sha256", sa.LargeBinary(length=32), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("role", sa.Text(), nullable=True, comment="component that the file carries"),
        sa.Column(
            "blob_position", sa.Integer(), nullable=False, comment="the file, or the header of a safetensors file"
        ),
        sa.Column("whole", sa.Boolean(), nullable=False),
        sa.CheckConstraint("length(sha256) = 32", name=op.f("ck_version_file_sha256_length")),
        sa.CheckConstraint("size >= 0", name=op.f("ck_version_file_size")),
        sa.ForeignKeyConstraint(
            ["version_id", "blob_position"],
            ["version_blob.version_id", "version_blob.position"],
            name=op.f("fk_version_file_version_id_blob_position"),
        ),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_version_file_version_id")),
        sa.PrimaryKeyConstraint("version_id", "path", name=op.f("pk_version_file")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("version_file", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_version_file_sha256"), ["sha256"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("version_file", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_version_file_sha256"))

    op.drop_table("version_file")
    op.drop_table("outbox")
    with op.batch_alter_table("version_blob", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_version_blob_blob_id"))

    op.drop_table("version_blob")
    with op.batch_alter_table("tensor_index", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_tensor_index_blob_id"))

    op.drop_table("tensor_index")
    with op.batch_alter_table("tag", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_tag_version_id"))
        batch_op.drop_index(batch_op.f("ix_tag_name_version_id"))

    op.drop_table("tag")
    with op.batch_alter_table("metric", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_metric_key_kind_value_version_id"))

    op.drop_table("metric")
    with op.batch_alter_table("metadata", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_metadata_key_text_value_version_id"))
        batch_op.drop_index(batch_op.f("ix_metadata_key_number_value_version_id"))

    op.drop_table("metadata")
    with op.batch_alter_table("lineage", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_lineage_parent_id"))

    op.drop_table("lineage")
    with op.batch_alter_table("finding", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_finding_code_version_id"))

    op.drop_table("finding")
    with op.batch_alter_table("event", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_event_version_id_seq"))
        batch_op.drop_index("ix_event_tag")

    op.drop_table("event")
    with op.batch_alter_table("component", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_component_layout_id"))

    op.drop_table("component")
    op.drop_table("blob_tensors")
    with op.batch_alter_table("version", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_version_manifest_digest"))
        batch_op.drop_index(batch_op.f("ix_version_lora_config_id_id"))
        batch_op.drop_index(batch_op.f("ix_version_layout_id_id"))
        batch_op.drop_index(batch_op.f("ix_version_kind_id"))
        batch_op.drop_index(batch_op.f("ix_version_created_at"))
        batch_op.drop_index(batch_op.f("ix_version_content_digest"))
        batch_op.drop_index(batch_op.f("ix_version_base_id_id"))

    op.drop_table("version")
    with op.batch_alter_table("target", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_target_module_layout_id"))

    op.drop_table("target")
    op.drop_table("module")
    with op.batch_alter_table("lora_target", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_lora_target_target_lora_config_id"))

    op.drop_table("lora_target")
    op.drop_table("layout_tensor")
    op.drop_table("blob")
    op.drop_table("registry_meta")
    with op.batch_alter_table("lora_config", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_lora_config_r"))

    op.drop_table("lora_config")
    with op.batch_alter_table("lease", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_lease_expires_at"))

    op.drop_table("lease")
    op.drop_table("layout")
    op.drop_table("artifact")
    op.drop_table("architecture")
