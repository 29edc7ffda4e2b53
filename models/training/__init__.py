"""What made `stet-tales`: a synthetic corpus, a tokenizer, a small Llama decoder and its training.

Run `python -m models.training --help`. Nothing here is imported by the server.
"""
