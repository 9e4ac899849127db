"""Fences and attempts of runs of evals, as jobs have them"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008_eval_run_fences"
down_revision = "0007_eval_run_leases"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    # Not in a batch: SQLite would have to drop the table, and items refer to it.
    for column in ("fence", "attempts"):
        op.add_column("eval_runs", sa.Column(column, sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Take back."""
    for column in ("attempts", "fence"):
        op.drop_column("eval_runs", column)
