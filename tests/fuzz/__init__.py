"""Requests that nobody means well with, against a real server with the embedded model.

    make fuzz                            # 10,000 requests
    make fuzz ARGS="--requests 1000 --seed 7"

Three kinds: bodies after the OpenAPI document, valid and not (schemathesis); bytes, mutated and invented (hypothesis);
and bodies that come slowly or never end. `tests/fuzz/test_fuzz.py` is the short version.
"""
