"""Builders run on a backend that answers by rule, unless a test asks for the embedded model."""

from __future__ import annotations

import pytest

from recllm.builders import session
from tests.builders.worlds import RuleBackend


@pytest.fixture
def backend(monkeypatch) -> RuleBackend:
    """Stands in for whichever model the options name."""
    stand_in = RuleBackend()
    monkeypatch.setattr(session, "make_backend", lambda options: stand_in)
    return stand_in
