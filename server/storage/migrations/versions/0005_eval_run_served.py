"""What base a run of an eval was made for, and how it was computed"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005_eval_run_served"
down_revision = "0004_evals"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    # Not in a batch: SQLite would have to drop the table, and items refer to it.
    op.add_column("eval_runs", sa.Column("served", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Take back."""
    op.drop_column("eval_runs", "served")
