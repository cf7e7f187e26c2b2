"""Errors that a user can act on: entry points print the message alone, without a traceback, and exit with 2."""


class EsolError(Exception):
    """Something the user can mend; the message names the file, key or field and says what to do."""


class ConfigError(EsolError):
    """A configuration key or value is wrong."""


class StrideError(ConfigError):
    """A backbone cannot have the output stride that it is wanted at."""


class DataError(EsolError):
    """Shards, index, images, labels or masks are missing or damaged."""


class CheckpointError(EsolError):
    """A checkpoint or a stage's output cannot be written, found or used."""


class WeightsError(EsolError):
    """Pretrained weights are missing or do not fit the model."""


class DivergenceError(EsolError):
    """Training produced a non-finite loss or gradient."""


class LaunchError(EsolError):
    """The processes that were started do not form the job that was asked for."""


class LostRankError(LaunchError):
    """Another process of the job ended or does not answer; nothing to mend here, so it has an exit code of its own."""


def first_line(error: BaseException) -> str:
    """What an error says in one line, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refused(error: OSError, place: object) -> str:
    """What a run says of a disk that refused it; place: where that was, if the error does not say."""
    return f"{error.filename or place}: {error.strerror}; when that is mended, go on with --resume"
