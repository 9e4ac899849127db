"""The requests of the clients. Each module builds those of one resource and sends nothing, so both clients share it."""
