"""Keeps from the user what libraries remark about parts of theirs that are not used here."""

from __future__ import annotations

import logging

_SAID_IN_VAIN = {
    "DeepSpeed": "Setting accelerator to CPU",  # goes to standard output, whenever accelerate is imported
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional kernel
}


def hush() -> None:
    """Filters the messages in `_SAID_IN_VAIN` from their loggers; to be called before those are imported."""
    for name, beginning in _SAID_IN_VAIN.items():
        logging.getLogger(name).addFilter(_Without(beginning))


class _Without(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)
