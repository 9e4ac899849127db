"""Leases of jobs. A request to pause replaces the request to cancel, since a job now ends at once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002_job_leases"
down_revision = "0001"
branch_labels = None
depends_on = None

jobs = sa.table("jobs", sa.column("status", sa.String), sa.column("cancel_requested", sa.Boolean))
checkpoints = sa.table("job_checkpoints", sa.column("kept", sa.Boolean))
LIVING = ("queued", "running")


def upgrade() -> None:
    """Apply."""
    stopping = jobs.c.cancel_requested & jobs.c.status.in_(LIVING)
    op.execute(jobs.update().where(stopping).values(status="cancelled"))
    op.execute(jobs.update().values(cancel_requested=False))
    # No batch: SQLite would have to drop the table, which events and checkpoints refer to.
    op.alter_column("jobs", "cancel_requested", new_column_name="pause_requested")
    op.add_column("jobs", sa.Column("base", sa.JSON(), nullable=True))
    op.add_column("jobs", sa.Column("lease_worker", sa.String(), nullable=True))
    op.add_column("jobs", sa.Column("lease_expires_at", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("fence", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("job_checkpoints", sa.Column("kept", sa.Boolean(), nullable=False, server_default=sa.true()))
    # Earlier checkpoints lie outside the blob store, where no code looks for them now.
    op.execute(checkpoints.update().values(kept=False))


def downgrade() -> None:
    """Revert."""
    op.drop_column("job_checkpoints", "kept")
    for column in ("attempts", "fence", "lease_expires_at", "lease_worker", "base"):
        op.drop_column("jobs", column)
    op.execute(sa.update(sa.table("jobs", sa.column("pause_requested", sa.Boolean))).values(pause_requested=False))
    op.alter_column("jobs", "pause_requested", new_column_name="cancel_requested")
