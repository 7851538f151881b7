"""Where builders' texts lie, and what their files say of the templates."""

from __future__ import annotations

from pathlib import Path

from recllm.errors import DataError
from recllm.prompts.templates import Template


def text_path(folder: Path, name: str, tag: str = "") -> Path:
    """Returns where texts of a name lie in a dataset folder."""
    return folder / "texts" / f"{name}{'-' if tag else ''}{tag}.parquet"


def near_texts(path: Path) -> str:
    """Returns the names of the texts that there are instead of `path`, for an error."""
    names = sorted(each.stem for each in path.parent.glob("*.parquet"))
    return f" (texts that there are: {', '.join(names)})" if names else ""


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raises a `DataError` where texts exist and may not be replaced."""
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists already; --overwrite replaces it, --tag writes beside it")


def describe_template(template: Template) -> dict[str, str]:
    """Returns a template's hash and where its wording is from."""
    return {"sha256": template.sha256, "source": template.source}
