"""Database, blobs and leases, under everything that must survive a crash.

database.py   sessions, migrations        tables.py   the rows
blobs.py      files by key                leases.py   one worker at a time, fenced
pages.py      pages of lists              outages.py  waiting for the database
"""
