"""The errors a user can meet. Each message says what is wrong, what was expected and what to do.

Every class takes one string, so that Ray can carry it between processes.
"""


class UnlearnError(Exception):
    """Base of all our errors; shown without a traceback unless `--debug` is given."""


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


class TrackingError(UnlearnError, RuntimeError):
    """MLflow refused something, or holds something else than expected."""


def own_error(error: BaseException | None) -> UnlearnError | None:
    """Our error inside what Ray made of it (which also derives from our class), if there is one."""
    while error is not None:
        inner = getattr(error, "cause", None) or error.__cause__
        if isinstance(error, UnlearnError) and not isinstance(inner, UnlearnError):
            return error
        error = inner
    return None
