"""The one exception that a person who asked for a model gets to see."""

from __future__ import annotations


class ModelError(Exception):
    """What was wrong with a model and what to do about it, in one line for a person.

    A command line prints it as it is and exits with code 2, without a traceback.
    """
