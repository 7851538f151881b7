"""Where builders' texts lie, and what their files say of the templates."""

from __future__ import annotations

from pathlib import Path

from recllm.errors import DataError
from recllm.prompts.templates import Template


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raises a `DataError` where texts exist and may not be replaced."""
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists already; --overwrite replaces it, --tag writes beside it")


def describe_template(template: Template) -> dict[str, str]:
    """Returns a template's hash and where its wording is from."""
    return {"sha256": template.sha256, "source": template.source}
