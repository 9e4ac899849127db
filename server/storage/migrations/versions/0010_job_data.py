"""Encoded data of jobs, checksums of checkpoints, and indexes for lists of jobs and evals and for leases"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010_job_data"
down_revision = "0009_store"
branch_labels = None
depends_on = None

REPLACED = (("ix_jobs_owner", "jobs"), ("ix_evals_owner", "evals"))
INDEXES = (
    ("ix_jobs_owner_created_at_id", "jobs", ["owner", "created_at", "id"]),
    ("ix_jobs_status", "jobs", ["status"]),
    ("ix_jobs_lease_worker", "jobs", ["lease_worker"]),
    ("ix_evals_owner_id", "evals", ["owner", "id"]),
    ("ix_eval_runs_lease_worker", "eval_runs", ["lease_worker"]),
)


def upgrade() -> None:
    """Apply."""
    # No batch: SQLite would have to drop the tables, which others refer to.
    op.add_column("jobs", sa.Column("data", sa.JSON(), nullable=True))
    op.add_column("job_checkpoints", sa.Column("files", sa.JSON(), nullable=True))
    for name, table in REPLACED:
        op.drop_index(name, table)
    for name, table, columns in INDEXES:
        op.create_index(name, table, columns)


def downgrade() -> None:
    """Revert."""
    for name, table, _ in INDEXES:
        op.drop_index(name, table)
    for name, table in REPLACED:
        op.create_index(name, table, ["owner"])
    op.drop_column("job_checkpoints", "files")
    op.drop_column("jobs", "data")
