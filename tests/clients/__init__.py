"""Clients whose dependencies conflict with the server's pins, in an environment of their own: `make test-clients`."""
