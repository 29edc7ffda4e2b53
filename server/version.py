"""The version of this server. Read by pyproject.toml; part of the identity."""

VERSION = "0.1.0"
