"""What a model will need and how fast it will be, before anything of it is loaded (docs/planner.md).

No module but `probe`, which is a process of its own, imports torch.
"""
