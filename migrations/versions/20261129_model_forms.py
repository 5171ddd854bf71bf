"""Models as rows: forms with their documents and modules with their sizes; layouts with their bases in one index

Revises: 20261123_skeletons
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "20261129_model_forms"
down_revision = "20261123_skeletons"
branch_labels = None
depends_on = None

WITHOUT_ROWID: dict[str, Any] = {"recreate": "auto", "table_kwargs": {"sqlite_with_rowid": False}}
"""A table that SQLite rebuilds would lose this."""
BINARY_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def forget_forms() -> None:
    """No row of one revision can be made one of the other. They follow from the store: `registry reindex` makes them."""
    op.execute("UPDATE version SET architecture_id = NULL WHERE architecture_id IS NOT NULL")
    op.execute("DELETE FROM module")
    op.execute("DELETE FROM architecture")


def upgrade() -> None:
    forget_forms()  # the revision before has none but by hand
    with op.batch_alter_table("architecture") as batch_op:
        batch_op.drop_column("arguments")
        batch_op.add_column(
            sa.Column("class_name", BINARY_TEXT, nullable=True, comment="only ever text; NULL: unknown")
        )
        batch_op.add_column(
            sa.Column(
                "exact",
                sa.Boolean(),
                nullable=False,
                comment="read from the model; else from the names of saved tensors",
            )
        )
        batch_op.add_column(
            sa.Column(
                "document", sa.Text(), nullable=False, comment="the whole form, canonical JSON; the digest is its own"
            )
        )

    with op.batch_alter_table("module", **WITHOUT_ROWID) as batch_op:
        batch_op.add_column(sa.Column("groups", sa.BigInteger(), nullable=False, comment="of a convolution"))
        batch_op.add_column(
            sa.Column(
                "rows", sa.BigInteger(), nullable=True, comment="first dimension of its weight; NULL: it has none"
            )
        )
        batch_op.add_column(
            sa.Column("columns", sa.BigInteger(), nullable=True, comment="second dimension of its weight")
        )
        batch_op.create_check_constraint(
            batch_op.f("ck_module_kind_known"),
            "kind IN ('linear', 'conv1d', 'conv2d', 'conv3d', 'embedding', 'transformers_conv1d', 'attention', 'experts', 'quantised', 'matrix', 'other')",
        )
        batch_op.create_check_constraint(batch_op.f("ck_module_groups"), "groups >= 1")

    with op.batch_alter_table("version") as batch_op:
        batch_op.drop_index(batch_op.f("ix_version_layout_id_id"))
        batch_op.create_index(
            batch_op.f("ix_version_layout_id_base_id_id"), ["layout_id", "base_id", "id"], unique=False
        )


def downgrade() -> None:
    with op.batch_alter_table("version") as batch_op:
        batch_op.drop_index(batch_op.f("ix_version_layout_id_base_id_id"))
        batch_op.create_index(batch_op.f("ix_version_layout_id_id"), ["layout_id", "id"], unique=False)

    forget_forms()
    with op.batch_alter_table("module", **WITHOUT_ROWID) as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_module_groups"), type_="check")
        batch_op.drop_constraint(batch_op.f("ck_module_kind_known"), type_="check")
        batch_op.drop_column("columns")
        batch_op.drop_column("rows")
        batch_op.drop_column("groups")

    with op.batch_alter_table("architecture") as batch_op:
        batch_op.drop_column("document")
        batch_op.drop_column("exact")
        batch_op.drop_column("class_name")
        batch_op.add_column(sa.Column("arguments", sa.Text(), nullable=True, comment="constructor arguments, JSON"))
