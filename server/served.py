"""The served model as its clients meet it: its name, its fingerprint, and its texts."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from server.engine.messages import Ready
from server.preparation import Preparation
from server.supervisor import EngineFailed
from server.text.tokenizer import ModelText, ModelTextError

logger = logging.getLogger("stet.service")

_TOKENIZER_THREADS = 2  # texts tokenized at once


class ServedModel:
    """Owns the text side, the threads that use it, and the grammars compiled lately. Empty until it was loaded.

    name         in requests and answers; "" until it is known
    fingerprint  a short hash of the identity: while it stays, a request with its seed gives the same text
    text         tokenizer and chat template; None until they are loaded

    What the engine says of itself (`Ready`) is the supervisor's, because each new engine says it again.
    """

    def __init__(self) -> None:
        self.name = ""
        self.fingerprint = ""
        self.text: ModelText | None = None
        self._tokenizers = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        # Apart from the tokenizers', so that grammars hold up nobody else.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._grammars: dict[str, str] = {}

    async def load(self, ready: Ready) -> None:
        """Read the model's text files, in a thread. Raises EngineFailed: then they cannot be used."""
        loop = asyncio.get_running_loop()
        try:
            self.name = await loop.run_in_executor(self._tokenizers, _public_name, ready.identity.model)
            self.text = await loop.run_in_executor(self._tokenizers, ModelText.load, Path(ready.model_path))
            identity = json.dumps(self.identity(ready), sort_keys=True)
            self.fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]
        except ModelTextError as error:
            raise EngineFailed(str(error), usage=True) from error
        except Exception as error:
            logger.exception("the model's text files could not be prepared")
            message = f"the model's text files cannot be used: {type(error).__name__}"
            raise EngineFailed(message, usage=True) from error

    def preparation(self, ready: Ready | None) -> Preparation | None:
        """What resolves a request; None until the engine is ready and the texts are loaded."""
        if ready is None or self.text is None:
            return None
        return Preparation(ready, self.text, self._tokenizers, self._compiler, self._grammars)

    def close(self) -> None:
        """Start nothing more in its threads."""
        self._tokenizers.shutdown(wait=False, cancel_futures=True)
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def identity(self, ready: Ready) -> dict[str, Any]:
        """The engine's identity under the public name: it holds no path."""
        return {**dataclasses.asdict(ready.identity), "model": self.name}


def _public_name(model: str) -> str:
    """What a model is called in answers: its Hub id or own name, or the last part of its path; no path."""
    path = Path(model)
    return path.resolve().name if path.is_absolute() or path.is_dir() else model
