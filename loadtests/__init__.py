"""Measurements: the engine, the start, the HTTP layer, each beside a peer or a floor from the same run."""
