"""The errors a user can meet. Each message says what is wrong, what was expected and what to do.

Every error takes one string, so that Ray can carry it between processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UnlearnError(Exception):
    """Base of all our errors; shown without a traceback unless `--debug` is given.

    Its text stays what it was when it was raised: Ray Data appends advice about its own retries to the `args` of
    whatever a task raises.
    """

    @property
    def args(self) -> tuple[Any, ...]:
        return BaseException.args.__get__(self)  # type: ignore[attr-defined]

    @args.setter
    def args(self, value: object) -> None:
        pass


class ConfigError(UnlearnError, ValueError):
    """The command line or a recipe is wrong. Exit code 2."""


class DataError(UnlearnError, ValueError):
    """Input rows are missing, unreadable or too often bad."""


class ModelError(UnlearnError, ValueError):
    """A model or tokenizer cannot be found, loaded or used with this recipe."""


class ClusterError(UnlearnError, RuntimeError):
    """The Ray cluster is not reachable or too small."""


class TrainingError(UnlearnError, RuntimeError):
    """Training had to stop: a worker failed or a number went bad."""


class BadNumbers(TrainingError):
    """A loss or gradient is not finite; raised on all ranks alike, with no parameter changed and no gradient left."""

    ranks: tuple[int, ...] = ()
    """Where, as far as known; not carried between processes."""


class StorageError(UnlearnError, OSError):
    """A file or folder cannot be written: no space, no right, a read-only file system."""


class Stopped(KeyboardInterrupt):
    """Somebody asked for an end: Ctrl-C, SIGTERM, `ray job stop`. Says what was saved; stays in its process."""

    def __init__(self, told: str, number: int):
        super().__init__(told)
        self.signal = number


class TrackingError(UnlearnError, RuntimeError):
    """MLflow refused something, or holds something else than expected."""


@contextmanager
def stall_told(what: str, seconds: float) -> Iterator[None]:
    """Turn Ray Data's giving up after `seconds` without progress into an error that names the cause.

    Raises:
        ClusterError: with the CPUs that are free, or with what Ray says of processes and nodes that died.
        UnlearnError: our own error out of what Ray made of it.
    """
    import ray
    from ray.data.exceptions import ExecutionTimeoutError

    from components.cluster import end_of, living, losses

    before = living()
    try:
        yield
    except ExecutionTimeoutError as error:
        free, there = (found.get("CPU", 0) for found in (ray.available_resources(), ray.cluster_resources()))
        raise ClusterError(
            f"{what} got no further for {seconds:g} s (free CPUs={free:g} of {there:g}). Expected enough free ones. "
            "Wait for other jobs to end, or add nodes; where all were free, a worker hangs or memory is short. "
            + losses(before)
        ) from error
    except Exception as error:
        own = own_error(error)
        if own is not None and own is not error:
            raise own from None
        if own or not isinstance(error, ray.exceptions.RayError) or isinstance(error, ray.exceptions.RayTaskError):
            raise
        advice = losses(before) or "Most likely memory ran out. Give the same command again, on more or larger nodes."
        raise ClusterError(f"{what} lost a process or its results: {end_of(error)}. {advice}") from error


def own_error(error: BaseException | None) -> UnlearnError | None:
    """Our error inside what Ray made of it (which also derives from our class), if there is one."""
    while error is not None:
        if getattr(error, "actor_init_failed", False):
            return _of_start(str(error))
        inner = getattr(error, "cause", None) or error.__cause__
        if isinstance(error, UnlearnError) and not isinstance(inner, UnlearnError):
            return error
        error = inner
    return None


def _of_start(text: str) -> UnlearnError | None:
    """Our error in the last line of the traceback that Ray keeps of an actor that could not start."""
    name, _, told = text.strip().splitlines()[-1].partition(": ")
    kind = globals().get(name.rpartition(".")[2])
    return kind(told) if isinstance(kind, type) and issubclass(kind, UnlearnError) else None
