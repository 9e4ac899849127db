"""Evaluations: criteria over a data set, and runs that score a model on it.

eval_service.py    create, list, cancel        evaluator.py       takes runs and works through their items
criteria.py        the criteria                items.py           one example through the door to the engine
run_repository.py  rows of runs                tally.py           sums over items;   text_metrics.py   F1, exact match
serving_fingerprint.py   what a run's scores depend on
"""
