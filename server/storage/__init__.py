"""Database tables, migrations and the blob store."""
