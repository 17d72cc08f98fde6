"""What code needs of its process: a thread beside it, an environment, requests to stop, files of its own."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def in_background(work: Callable[[threading.Event], None], name: str) -> Iterator[None]:
    """Inside, `work` runs in a thread. On leaving, the event that it was given is set, and its end waited for."""
    done = threading.Event()
    thread = threading.Thread(target=work, args=(done,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Inside, the environment has these variables. On leaving, they are as they were before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


REQUEST = 3.0
"""Seconds from the first signal of a request within which others are part of it."""
_requested = -math.inf


def is_request() -> bool:
    """Whether a signal that has just come is a request of its own; for signal handlers.

    `timeout`, Slurm and the inits of containers signal a process and then its group, so that one request to stop comes
    twice; as two, the second would undo what the first was there for: an end in order. All handlers of a process share
    this, since the second may come when another one is in charge.
    """
    global _requested
    now = time.monotonic()
    if now - _requested < REQUEST:
        return False
    _requested = now
    return True


def keep_private() -> None:
    """From now on, let only this account read what the process writes: files are 0600 and folders 0700 from the start.

    They hold the texts of people who asked to be forgotten. Ray's workers do not inherit this on a cluster that was
    started elsewhere, so every function that runs in one and writes calls it. A default ACL of a folder goes before it.
    """
    os.umask(0o077)
