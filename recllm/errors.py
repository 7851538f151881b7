"""The one exception that recllm raises for what a user can mend."""


class DataError(ValueError):
    """Input, configuration or a file on disk is not as it must be.

    The message names the file, row or id, says what was expected and what to do. The command line prints it
    without a traceback and exits with status 1.
    """


class BusyError(DataError):
    """Another process is writing the same folder."""
