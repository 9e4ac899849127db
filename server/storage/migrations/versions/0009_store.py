"""The database's id, hashes of artifacts' files, and indices for pages of files"""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0009_store"
down_revision = "0008_eval_run_fences"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    identity = op.create_table(
        "identity", sa.Column("id", sa.String(), nullable=False), sa.PrimaryKeyConstraint("id", name="pk_identity")
    )
    op.bulk_insert(identity, [{"id": uuid.uuid4().hex}])
    op.add_column("versions", sa.Column("file_hashes", sa.JSON(), nullable=True))
    op.drop_index("ix_files_owner", "files")
    op.create_index("ix_files_owner_created_at_id", "files", ["owner", "created_at", "id"])
    op.create_index("ix_files_owner_purpose_created_at_id", "files", ["owner", "purpose", "created_at", "id"])


def downgrade() -> None:
    """Take back."""
    op.drop_index("ix_files_owner_purpose_created_at_id", "files")
    op.drop_index("ix_files_owner_created_at_id", "files")
    op.create_index("ix_files_owner", "files", ["owner"])
    op.drop_column("versions", "file_hashes")
    op.drop_table("identity")
