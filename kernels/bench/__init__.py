"""python -m kernels.bench: each operation against its floor and its peers. kernels.bench.sweep: tuned constants."""
