"""Files in parts (splices), state documents, described blobs, purged versions, external blobs

Revises: 20261123_first
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "20261123_skeletons"
down_revision = "20261123_first"
branch_labels = None
depends_on = None

WITHOUT_ROWID: dict[str, Any] = {"recreate": "auto", "table_kwargs": {"sqlite_with_rowid": False}}
"""A table that SQLite rebuilds would lose this."""


def upgrade() -> None:
    op.create_table(
        "described_blob",
        sa.Column(
            "artifact_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False
        ),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("role", sa.Text(), nullable=False, comment="probe, live_names, history, ..."),
        sa.Column("blob_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.ForeignKeyConstraint(
            ["artifact_id", "seq"], ["event.artifact_id", "event.seq"], name=op.f("fk_described_blob_artifact_id_seq")
        ),
        sa.ForeignKeyConstraint(["blob_id"], ["blob.id"], name=op.f("fk_described_blob_blob_id")),
        sa.PrimaryKeyConstraint("artifact_id", "seq", "role", name=op.f("pk_described_blob")),
        comment="blobs that a described event names; gc keeps them",
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("described_blob") as batch_op:
        batch_op.create_index(batch_op.f("ix_described_blob_blob_id"), ["blob_id"], unique=False)

    with op.batch_alter_table("component") as batch_op:
        batch_op.add_column(
            sa.Column("data_position", sa.Integer(), nullable=True, comment="the state document; NULL: tensors alone")
        )
        batch_op.create_foreign_key(
            batch_op.f("fk_component_version_id_data_position"),
            "version_blob",
            ["version_id", "data_position"],
            ["version_id", "position"],
        )

    with op.batch_alter_table("event") as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_event_kind_known"), type_="check")
        batch_op.create_check_constraint(
            batch_op.f("ck_event_kind_known"),
            "kind IN ('pushed', 'described', 'tag_moved', 'tag_protected', 'tag_unprotected', 'tag_deleted', 'metadata', 'metrics', 'note', 'removed', 'restored', 'purged')",
        )

    with op.batch_alter_table("version") as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_version_state_known"), type_="check")
        batch_op.create_check_constraint(
            batch_op.f("ck_version_state_known"), "state IN ('present', 'removed', 'purged')"
        )

    with op.batch_alter_table("version_blob", **WITHOUT_ROWID) as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_version_blob_role_known"), type_="check")
        batch_op.create_check_constraint(
            batch_op.f("ck_version_blob_role_known"),
            "role IN ('tensors', 'reused', 'header', 'file', 'data', 'layout', 'manifest', 'external')",
        )

    with op.batch_alter_table("version_file", **WITHOUT_ROWID) as batch_op:
        batch_op.add_column(
            sa.Column(
                "splices",
                sa.Text(),
                nullable=True,
                comment="tensors within a skeleton, JSON as in a placement; NULL: none, or the component",
            )
        )
        batch_op.create_check_constraint(
            batch_op.f("ck_version_file_splices_of_skeleton"), "splices IS NULL OR (NOT whole AND role IS NULL)"
        )


def downgrade() -> None:
    with op.batch_alter_table("version_file", **WITHOUT_ROWID) as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_version_file_splices_of_skeleton"), type_="check")
        batch_op.drop_column("splices")

    with op.batch_alter_table("version_blob", **WITHOUT_ROWID) as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_version_blob_role_known"), type_="check")
        batch_op.create_check_constraint(
            batch_op.f("ck_version_blob_role_known"),
            "role IN ('tensors', 'reused', 'header', 'file', 'layout', 'manifest')",
        )

    with op.batch_alter_table("version") as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_version_state_known"), type_="check")
        batch_op.create_check_constraint(batch_op.f("ck_version_state_known"), "state IN ('present', 'removed')")

    with op.batch_alter_table("event") as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_event_kind_known"), type_="check")
        batch_op.create_check_constraint(
            batch_op.f("ck_event_kind_known"),
            "kind IN ('pushed', 'described', 'tag_moved', 'tag_protected', 'tag_unprotected', 'tag_deleted', 'metadata', 'metrics', 'note', 'removed', 'restored')",
        )

    with op.batch_alter_table("component") as batch_op:
        batch_op.drop_constraint(batch_op.f("fk_component_version_id_data_position"), type_="foreignkey")
        batch_op.drop_column("data_position")

    with op.batch_alter_table("described_blob") as batch_op:
        batch_op.drop_index(batch_op.f("ix_described_blob_blob_id"))

    op.drop_table("described_blob")
