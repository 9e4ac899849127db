"""The report on a job's data"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003_data_report"
down_revision = "0002_job_leases"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("data_report", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Revert."""
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("data_report")
