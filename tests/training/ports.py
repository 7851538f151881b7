"""Ports for launched processes."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Returns a port that nobody listens on, so that launches side by side do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
