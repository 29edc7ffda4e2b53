"""Decoder language models: configuration, checkpoints, layers, and one file a family. Imports kernels only."""
