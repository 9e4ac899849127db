"""Database, blobs and leases, under everything that must survive a crash.

database.py         sessions, migrations             tables.py      the rows
blobs.py            files by key                     pins.py        keep blobs that are in use
blob_cache.py       local copies of remote blobs     leases.py      one worker at a time, fenced
store_identity.py   a database and its own store     reserve.py     room to delete on a full disk
pages.py            pages of lists                   outages.py     waiting for the database
"""
