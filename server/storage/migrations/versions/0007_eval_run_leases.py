"""Leases of eval runs"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007_eval_run_leases"
down_revision = "0006_squad_matches"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    # No batch: SQLite would have to drop the table, which items refer to.
    op.add_column("eval_runs", sa.Column("lease_worker", sa.String(), nullable=True))
    op.add_column("eval_runs", sa.Column("lease_expires_at", sa.Double(), nullable=True))


def downgrade() -> None:
    """Revert."""
    for column in ("lease_expires_at", "lease_worker"):
        op.drop_column("eval_runs", column)
