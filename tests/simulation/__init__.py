"""The real scheduler and block pool on a virtual clock, against a fake model, under faults drawn per seed.

world.py       what a seed stands for: the engine's limits, the requests, which faults happen how often
device.py      a fake model whose next token depends on all that is physically stored in the blocks it is told to read
oracle.py      the right answer, computed without blocks
invariants.py  what must hold at every step, seen from the outside
driver.py      one seed from the first request to the last: the core's policies, the faults, the verdict
planted.py     bugs that the simulation has to find
"""
