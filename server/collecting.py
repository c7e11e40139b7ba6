"""Garbage collection while Flower's loop runs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def few_to_collect() -> Iterator[None]:
    """Leave what is in memory at the start out of garbage collections.

    Some of Flower's rules collect garbage once for every reply; among the objects of torch and Ray that takes a third
    of a second each time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
