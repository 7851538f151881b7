"""What the `recllm build ...` and `recllm prompts ...` commands do and print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from recllm.builders.options import ImagePromptOptions, InstructionOptions, ItemOptions, UserOptions
from recllm.errors import DataError
from recllm.files import staged_folder
from recllm.prompts import TEMPLATES

__all__ = [
    "CopyOptions",
    "ImagePromptOptions",
    "InstructionOptions",
    "ItemOptions",
    "ListOptions",
    "UserOptions",
    "image_prompts",
    "instructions",
    "items",
    "prompts_cp",
    "prompts_ls",
    "users",
]


@dataclass
class ListOptions:
    """Lists the prompt templates: name, source, placeholders, text."""


@dataclass
class CopyOptions:
    """Writes the prompt templates as text files, to be changed and given to builders with --templates."""

    out: Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """The folder to make. Files that are not changed may be deleted: the defaults stand in for them."""


def items(options: ItemOptions) -> None:
    """Writes texts about items."""
    from recllm.builders.items import summarize_items

    summarize_items(options)


def users(options: UserOptions) -> None:
    """Writes texts about users."""
    from recllm.builders.users import summarize_users

    summarize_users(options)


def instructions(options: InstructionOptions) -> None:
    """Writes instruction tuples."""
    from recllm.builders.instructions import build_instructions

    build_instructions(options)


def image_prompts(options: ImagePromptOptions) -> None:
    """Writes REVEAL's initial prompts."""
    from recllm.builders.image_prompts import write_initial_prompts

    write_initial_prompts(options)


def prompts_ls(options: ListOptions) -> None:
    """Prints the prompt templates."""
    for template in TEMPLATES.values():
        print(f"{template.name}  ({template.source})")
        for name, meaning in template.fields.items():
            needed = ", required" if name in template.required else ""
            print(f"  {{{name}}}: {meaning}{needed}")
        for line in template.text.split("\n"):
            print(f"    {line}")


def prompts_cp(options: CopyOptions) -> None:
    """Writes the prompt templates as text files."""
    if options.out.exists():
        raise DataError(f"{options.out} exists already; give another folder")
    with staged_folder(options.out) as staging:
        for template in TEMPLATES.values():
            (staging / f"{template.name}.txt").write_text(template.text + "\n", encoding="utf-8")
    print(f"{options.out}: {len(TEMPLATES)} templates; change them and give --templates {options.out}")
