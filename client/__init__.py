"""The Python client and command line of ReftServe; needs no torch."""
