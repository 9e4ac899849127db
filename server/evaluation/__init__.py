"""Scores of the base and of interventions on data sets: label sets, criteria, runs."""
