"""The one exception that recllm raises for what a user can mend."""

from recllm.printing import printable


class DataError(ValueError):
    """Input, configuration or a file on disk is not as it must be.

    The message names the file, row or id, says what was expected and what to do. The command line prints it
    without a traceback and exits with status 1. Text from data in it is escaped where it is not printable.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class BusyError(DataError):
    """Another process is writing the same folder."""
