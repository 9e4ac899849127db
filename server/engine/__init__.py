"""Requests in, token streams out. Knows no HTTP and no database."""
