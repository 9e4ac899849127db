"""The mathematics of interventions: edits, families, positions, artifacts."""
