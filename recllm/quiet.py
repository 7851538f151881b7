"""Keeps from the user what libraries remark about parts of theirs that are not used here."""

from __future__ import annotations

import logging
import warnings

_SAID_IN_VAIN = {
    "DeepSpeed": "Setting accelerator to CPU",  # goes to standard output, whenever accelerate is imported
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional kernel
}


_WARNED_IN_VAIN = ("`is_gradient_checkpointing` is deprecated",)  # what PEFT still reads of transformers


def hush() -> None:
    """Filters those messages from loggers and warnings; to be called before the libraries are imported."""
    for beginning in _WARNED_IN_VAIN:
        warnings.filterwarnings("ignore", message=beginning, category=FutureWarning)
    for name, beginning in _SAID_IN_VAIN.items():
        logging.getLogger(name).addFilter(_Without(beginning))


class _Without(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)
