"""Clients that leave, do not read, come ten times too many, or flood: what becomes of the server and of the others."""
