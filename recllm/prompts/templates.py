"""Prompt templates: plain text with `{placeholders}`, which a user replaces with files of the same names."""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from recllm.errors import DataError
from recllm.prompts.safe_text import IMAGE_MARK, neutralize

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_LABELED = re.compile(r"[^{}]*:(?:\s*\{[^{}]+\})+\s*")


@dataclass(frozen=True)
class Template:
    """A prompt with placeholders.

    Attributes:
        name: `<system>.<step>`; the file that replaces it is called `<name>.txt`.
        text: The text; `{field}` is filled in, `{{` and `}}` are braces.
        fields: The placeholders that may stand in it, with what each is filled with.
        required: Those that must.
        source: Where the wording is from.
    """

    name: str
    text: str
    fields: Mapping[str, str]
    required: tuple[str, ...] = ()
    source: str = "ours"

    def __post_init__(self) -> None:
        self._check(self.text, f"template {self.name}")

    def fill(self, values: Mapping[str, str], special_tokens: Iterable[str] = ()) -> str:
        """Returns the prompt. Values are inserted as they are, so those from data must have gone through
        `safe_text`; what data and template form together at their seams is made harmless here.

        Args:
            values: A value for each placeholder. A line that is a label with empty values (`Text: {text}`) is
                left out.
            special_tokens: As for `safe_text`.

        Raises:
            DataError: Nothing is left of the prompt.
        """
        lines = []
        for line in self.text.split("\n"):
            if _LABELED.fullmatch(line) and not any(values[name] for name in _fields_of(line)):
                continue
            lines.append(_FIELD.sub(lambda found: _replacement(found, values), line))
        filled = neutralize("\n".join(lines), special_tokens)
        if not filled.strip():
            raise DataError(f"template {self.name}: nothing is left of it where all its values are empty")
        return filled

    @property
    def sha256(self) -> str:
        """A hash of the text: 16 hex digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def replaced_by(self, text: str, where: str) -> Template:
        """Returns this template with another text.

        Raises:
            DataError: A placeholder is unknown, or a required one is missing.
        """
        self._check(text, where)
        return Template(self.name, text, self.fields, self.required, where)

    def _check(self, text: str, where: str) -> None:
        if not text.strip():
            raise DataError(f"{where}: the template is empty")
        if neutralize(text) != text:
            raise DataError(f"{where}: a special token or a tag stands in the template; write plain text")
        for character in text:
            if character != "\n" and (character == IMAGE_MARK or unicodedata.category(character)[0] == "C"):
                raise DataError(f"{where}: the character {character!a} may not stand in a template")
        for found in _FIELD.finditer(text):
            if found[0] in "{}":
                raise DataError(f"{where}: a single {found[0]!r}; write {{{{ or }}}} for a brace")
        used = _fields_of(text)
        for name in used:
            if name not in self.fields:
                near = difflib.get_close_matches(name, self.fields, n=1)
                known = ", ".join(f"{{{field}}}" for field in self.fields) or "none"
                hint = f"; did you mean {{{near[0]}}}?" if near else ""
                raise DataError(f"{where}: unknown placeholder {{{name}}}{hint} (known: {known})")
        if missing := [name for name in self.required if name not in used]:
            raise DataError(
                f"{where}: the placeholder {{{missing[0]}}} is missing: {self.fields[missing[0]]}"
            )


def load_templates(defaults: Mapping[str, Template], folder: Path | None) -> dict[str, Template]:
    """Returns the templates, those replaced for which `folder` has a file `<name>.txt`.

    Args:
        defaults: The templates by name.
        folder: A folder with replacements; None for none.

    Raises:
        DataError: The folder is missing, a file is not UTF-8, has the name of no template, or wrong
            placeholders.
    """
    templates = dict(defaults)
    if folder is None:
        return templates
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder; `recllm prompts cp {folder}` makes it, with the defaults")
    for path in sorted(Path(folder).iterdir()):
        if path.name.startswith(".") or path.suffix == ".md":
            continue
        if path.suffix != ".txt" or path.stem not in defaults:
            near = difflib.get_close_matches(path.name, [f"{name}.txt" for name in defaults], n=1, cutoff=0)
            raise DataError(f"{path}: replaces no template; the nearest name is {near[0]}")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error})") from None
        templates[path.stem] = defaults[path.stem].replaced_by(text.rstrip("\n"), str(path))
    return templates


def _fields_of(text: str) -> list[str]:
    return [found[1] for found in _FIELD.finditer(text) if found[1] is not None]


def _replacement(found: re.Match[str], values: Mapping[str, str]) -> str:
    if found[1] is None:
        return found[0][0]
    return values[found[1]]
