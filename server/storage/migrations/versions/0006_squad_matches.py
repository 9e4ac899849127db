"""Exact match is strict by default; existing criteria keep SQuAD's normalization"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006_squad_matches"
down_revision = "0005_eval_run_served"
branch_labels = None
depends_on = None

evals = sa.table("evals", sa.column("id", sa.String), sa.column("criteria", sa.JSON))


def upgrade() -> None:
    """Apply."""
    _change_matches(lambda criterion: {**criterion, "normalize": "squad"})


def downgrade() -> None:
    """Revert."""
    _change_matches(lambda criterion: {key: value for key, value in criterion.items() if key != "normalize"})


def _change_matches(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    connection = op.get_bind()
    for identity, criteria in connection.execute(sa.select(evals.c.id, evals.c.criteria)).all():
        changed = [change(each) if each["type"] == "exact_match" else each for each in criteria]
        connection.execute(evals.update().where(evals.c.id == identity).values(criteria=changed))
