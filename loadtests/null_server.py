"""`stet`, but with the engine of `loadtests.null_engine`: what is measured then is everything above the engine."""

from __future__ import annotations

import sys

from server.cli import main

if __name__ == "__main__":
    sys.exit(main(engine_command=[sys.executable, "-m", "loadtests.null_engine"]))
