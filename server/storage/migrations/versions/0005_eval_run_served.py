"""Fingerprint, dtype and quantization of the base that an eval run evaluates"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005_eval_run_served"
down_revision = "0004_evals"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    # No batch: SQLite would have to drop the table, which items refer to.
    op.add_column("eval_runs", sa.Column("served", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Revert."""
    op.drop_column("eval_runs", "served")
