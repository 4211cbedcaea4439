"""Imports of large libraries.

with uncollected():
    import vllm
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keeps the garbage collector from the objects that imports create in this block, then and later.

    torch, transformers and vLLM create a million objects that stay. Looking at them again and again takes a fifth of
    the import's time, and later makes pauses in the process.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
