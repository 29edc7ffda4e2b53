"""python -m kernels.bench: each operation against its floor and a stock peer."""
