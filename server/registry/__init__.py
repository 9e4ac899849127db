"""Published interventions: names, versions, aliases, artifacts.

intervention_registry.py   publish, resolve, pin, delete     names.py    references such as `name@3`
composition.py             a request's interventions         store.py    opens everything durable together
queries.py                 bounded queries by name           inspection.py   the doctor: faults, lost rows
stored_artifact.py         hashes of an artifact's files
"""
