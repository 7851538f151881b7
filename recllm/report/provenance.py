"""`recllm whatis`: what made a file or folder of recllm, from which files, and what has changed since."""

from __future__ import annotations

import json
import shlex
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import polars as pl
from tyro.conf import Positional, arg

from recllm.data.candidate_files import Candidates
from recllm.data.dataset import describe_file, hash_of_files
from recllm.data.origins import MADE
from recllm.data.texts import METADATA_KEY
from recllm.errors import DataError
from recllm.files import MANIFEST, read_json

_HASHES = {"data_hash": "dataset", "split_hash": "split"}
_SHOWN = ("system", "protocol", "status", "ranker", "model", "part", "name", "seed", "templates")
_PATHS = ("command", "dataset", "split", "path", "weights", "run", "adapter", "text", "image")
_PATHS += ("texts", "user_text", "item_texts", "prompts", "lists", "ranks")
_SHORT, _LONGEST = 12, 300


@dataclass
class WhatisOptions:
    """Says what made a file or folder of recllm, from which files, and what has changed since.

    The files that it was made from are looked for at the paths that the command names, from the current
    folder and from the folders above the file. Each is described in the same way, back to the raw log. The
    weights of runs and the vectors are not compared with anything.
    """

    path: Positional[Annotated[Path, arg(metavar="PATH")]]
    """A file or folder that recllm wrote."""


@dataclass
class Thing:
    """One file or folder that recllm wrote.

    Attributes:
        path: Where it is.
        what: What it is, in words.
        content: Its manifest or its file's metadata.
        own: The kind of hash that others state about it, and its present value; None where there is none.
        damage: Why it is not as it was written; None where nothing is known to be wrong.
        inputs: The paths of what it was made from, as far as they are found.
        made_from: The same, read; empty until `_follow` has read them.
        unreadable: Why inputs could not be read.
    """

    path: Path
    what: str
    content: Mapping[str, Any] = field(default_factory=dict)
    own: tuple[str, str] | None = None
    damage: str | None = None
    inputs: list[Path] = field(default_factory=list)
    made_from: list[Thing] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def stated(self) -> dict[str, str]:
        """The hashes that it states of what it was made from, by kind."""
        found = {kind: self.content.get(name) for name, kind in _HASHES.items()}
        found["candidates"] = self.content.get("candidates")
        return {kind: value for kind, value in found.items() if isinstance(value, str) and value}


def whatis(options: WhatisOptions) -> None:
    """Prints the provenance of a file or folder.

    Raises:
        DataError: recllm did not write it, or it does not exist.
    """
    for line in describe(options.path):
        print(line)


def describe(path: Path) -> Iterator[str]:
    """Yields the lines of `recllm whatis`.

    Raises:
        DataError: recllm did not write the path, or it does not exist.
    """
    thing = read_thing(path)
    _follow(thing, {thing.path.resolve()})
    yield from _lines(thing, {}, 0)


def read_thing(path: Path) -> Thing:
    """Reads what a file or folder states about itself.

    Raises:
        DataError: It does not exist, or states nothing.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            raise DataError(f"{path} has no {MANIFEST}: recllm did not write it, or not to its end")
        return _of_folder(path, read_json(path / MANIFEST, "a folder that recllm wrote"))
    content = _metadata(path)
    if content:
        thing = Thing(path, _kind_of_file(path, content), content)
        if thing.what == "candidate lists":
            thing.own = ("candidates", str(content.get("candidates")))
            thing.damage = _damage(lambda: Candidates.read(path))
    else:
        return _listed(path)
    thing.inputs = _inputs(thing)
    return thing


def _of_folder(path: Path, manifest: dict[str, Any]) -> Thing:
    files = manifest.get("files")
    if {"format", "source", "files"} <= manifest.keys():
        thing = Thing(path, "dataset", manifest, ("dataset", hash_of_files(manifest["files"])))
    elif path.parent.name == "splits":
        thing = Thing(path, "split", manifest, ("split", hash_of_files(manifest["files"])))
    elif path.parent.name == "candidates":
        thing = Thing(path, "folder of candidate lists", manifest)
    else:
        kind = manifest.get("kind") or ("instructions" if path.parent.name == "instructions" else "folder")
        thing = Thing(path, str(kind), manifest)
    if isinstance(files, dict):
        wrong = [name for name, stated in sorted(files.items()) if not _as_stated(path / name, stated)]
        if wrong:
            thing.damage = f"{', '.join(wrong)}: missing, or not as written"
    thing.inputs = _inputs(thing)
    return thing


def _listed(path: Path) -> Thing:
    """A file without metadata of its own, which belongs to the folder of a manifest."""
    for folder in path.resolve().parents:
        if (folder / MANIFEST).is_file():
            thing = read_thing(folder)
            thing.what = f"part of {folder.name}, a {thing.what}"
            thing.inputs = [each for each in thing.inputs if each.resolve() != folder]
            thing.path = path
            return thing
    raise DataError(
        f"{path} has no metadata of recllm, and no folder above it has a {MANIFEST}: recllm did not write it"
    )


def _metadata(path: Path) -> dict[str, Any]:
    """The `recllm.*` metadata of a parquet or safetensors file, in one table."""
    if path.suffix == ".parquet":
        try:
            stored: Mapping[str, str] = pl.read_parquet_metadata(path)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path} is not readable as parquet ({error})") from None
    elif path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                stored = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is not readable as safetensors ({error})") from None
        stored = stored if MADE in stored else {}
    else:
        return {}
    ours = {key: value for key, value in stored.items() if key.startswith("recllm.") or key == "kind"}
    if not any(key.startswith("recllm.") for key in ours):
        return {}
    content: dict[str, Any] = {"is": [*ours]}
    for key, value in ours.items():
        if value.startswith("{"):
            content |= _object(value, path)
        else:
            content[key.removeprefix("recllm.")] = value
    return content


def _object(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: its metadata is not JSON ({error}); write the file again") from None
    return found if isinstance(found, dict) else {}


def _kind_of_file(path: Path, content: Mapping[str, Any]) -> str:
    if METADATA_KEY in content["is"]:
        return "texts"
    if path.suffix == ".safetensors":
        return str(content.get("kind", "vectors"))
    if MADE not in content["is"] and "candidates" in content:
        return "candidate lists"
    names = set(pl.read_parquet_schema(path))
    kinds = {
        "label": "candidate lists",
        "above": "rank records",
        "neighbor": "neighbors",
        "rank": "top-K lists",
        "score": "scores",
    }
    of_columns = next((kind for column, kind in kinds.items() if column in names), None)
    named = [key.removeprefix("recllm.") for key in content["is"] if key != MADE]
    return of_columns or (named[0] if len(named) == 1 else "file")


def _inputs(thing: Thing) -> list[Path]:
    """The files and folders that a thing names and that exist, without what only holds it."""
    own = thing.path.resolve()
    found: dict[Path, Path] = {}
    dataset = thing.content.get("dataset")
    bases = [Path(), *own.parents[:4], *([Path(dataset)] if isinstance(dataset, str) else [])]
    for name in (*_by_place(thing), *_names(thing.content)):
        parts = Path(name).parts
        if own.parts[-len(parts) :] == parts:
            continue  # the thing itself, as its own command names it
        for base in bases:
            place = base / name
            if not place.exists():
                continue
            if not own.is_relative_to(place.resolve()) or place.resolve() in own.parents:
                found.setdefault(place.resolve(), place)
            break
    return [place for real, place in found.items() if real != own and _states_itself(place)]


def _by_place(thing: Thing) -> Iterator[Path]:
    """The dataset and the split whose folder a thing lies in, and the split of its dataset by hash."""
    place = thing.path.resolve()
    for folder in place.parents:
        if (folder / MANIFEST).is_file() and folder.parent.name == "splits":
            yield _from_here(folder)
        if (folder / "interactions.parquet").is_file() and (folder / MANIFEST).is_file():
            yield _from_here(folder)
            for manifest in _splits(folder, thing.content.get("split_hash")):
                yield _from_here(manifest.parent)
            return


def _splits(dataset: Path, split_hash: str | None) -> Iterator[Path]:
    """The manifests of a dataset's splits that have a hash."""
    for manifest in sorted(dataset.glob(f"splits/*/{MANIFEST}")) if split_hash else ():
        if hash_of_files(read_json(manifest, "a split")["files"]) == split_hash:
            yield manifest


def _names(content: Any, key: str = "") -> Iterator[str]:
    """The strings of a manifest that may be paths: the command's words, and values that look like paths."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            if name not in ("files", "packages", "facts", "counts", "templates", "decoding"):
                yield from _names(value, str(name))
    elif isinstance(content, list):
        for value in content:
            yield from _names(value, key)
    elif isinstance(content, str) and key in _PATHS and 0 < len(content) <= _LONGEST and "\0" not in content:
        yield content
        if key in ("text", "image", "texts", "user_text", "item_texts"):
            yield from (f"texts/{name}.parquet" for name in content.split("+"))


def _states_itself(path: Path) -> bool:
    if path.is_dir():
        return (path / MANIFEST).is_file()
    try:
        return path.suffix in (".parquet", ".safetensors") and bool(_metadata(path))
    except DataError:
        return False


def _follow(thing: Thing, seen: set[Path]) -> None:
    """Reads what a thing was made from, and what that was made from, each once."""
    for path in thing.inputs:
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        try:
            each = read_thing(path)
        except DataError as error:
            thing.unreadable.append(str(error))
            continue
        _follow(each, seen)
        thing.made_from.append(each)
    kinds = {each.what for each in _all_of(thing)}
    wanted = thing.stated.get("split") if "split" not in kinds else None
    datasets = [each.path for each in _all_of(thing) if each.what == "dataset"] if wanted else []
    for path in (manifest.parent for each in datasets for manifest in _splits(each, wanted)):
        if path.resolve() not in seen:
            seen.add(path.resolve())
            thing.made_from.append(read_thing(path))
    wanted = thing.stated.get("candidates")
    splits = [each.path for each in _all_of(thing) if each.what == "split"] if wanted else []
    for path in (path for split in splits for path in sorted(split.glob("candidates/*/*.parquet"))):
        if path.resolve() not in seen and _states_itself(path) and _metadata(path)["candidates"] == wanted:
            seen.add(path.resolve())
            thing.made_from.append(read_thing(path))


def _all_of(thing: Thing) -> Iterator[Thing]:
    for each in thing.made_from:
        yield each
        yield from _all_of(each)


def _lines(thing: Thing, stated: Mapping[str, str], depth: int) -> Iterator[str]:
    """The lines about a thing; `stated` are the hashes that whatever was made from it states."""
    pad = "  " * depth
    status = ""
    if thing.own is not None and thing.own[0] in stated:
        same = stated[thing.own[0]] == thing.own[1]
        now = f"CHANGED SINCE: was {stated[thing.own[0]][:_SHORT]}, is {thing.own[1][:_SHORT]}"
        status = " (unchanged)" if same else f" ({now})"
    if thing.damage:
        status = f" (NOT AS WRITTEN: {_plain(thing.damage)})"
    yield f"{pad}{_plain(thing.path)}: {_plain(thing.what)}{status}"
    yield from (f"{pad}  {line}" for line in _facts(thing))
    yield from (f"{pad}  {_plain(line)}" for line in thing.unreadable)
    kinds = {each.own[0] for each in _all_of(thing) if each.own}
    if depth == 0:
        for kind in thing.stated.keys() - kinds - ({thing.own[0]} if thing.own else set()):
            if kind != "candidates" or "/full" not in str(thing.content.get("protocol")):
                hashed = thing.stated[kind][:_SHORT]
                yield f"{pad}  the {kind} that it was made from (hash {hashed}) was not found from here"
    for each in thing.made_from:
        yield from _lines(each, {**stated, **thing.stated}, depth + 1)


def _facts(thing: Thing) -> Iterator[str]:
    content, run = thing.content, thing.content.get("run")
    if isinstance(run, Mapping):
        yield f"command: {_plain(shlex.join(map(str, run.get('command', []))))}"
        versions = run.get("packages") or {}
        shown = (name for name in ("torch", "transformers") if versions.get(name))
        named = ", ".join(f"{name} {versions[name]}" for name in shown)
        yield _plain(
            f"made: {run['time'] + ', ' if run.get('time') else ''}recllm {run.get('recllm')} at "
            f"{run.get('git') or 'no git revision'}" + (f", {named}" if named else "")
        )
    for name in _SHOWN:
        value = content.get(name, (content.get("settings") or {}).get(name))
        if value is not None and value != "":
            yield _plain(f"{name}: {_named(name, value)}")
    if isinstance(content.get("source"), Mapping):
        yield _plain(f"source: {_source(content['source'])}")
    if isinstance(content.get("coverage"), Mapping):
        yield _plain(f"coverage: {json.dumps(content['coverage'])}")


def _source(source: Mapping[str, Any]) -> str:
    facts = ((name, value) for name, value in source.items() if isinstance(value, str | int | float))
    return ", ".join(f"{name} {value}" for name, value in facts if value != "" and name != "truth")


def _named(name: str, value: Any) -> str:
    """Templates by their names, a model by its facts."""
    if not isinstance(value, Mapping):
        return str(value)
    if name == "templates":
        return ", ".join(value)
    return ", ".join(f"{key} {fact}" for key, fact in value.items() if isinstance(fact, str | int | float))


def _plain(text: object) -> str:
    """Returns text from a file without control characters, and not longer than a few lines."""
    kept = "".join("?" if unicodedata.category(each).startswith("C") else each for each in str(text))
    return kept if len(kept) <= _LONGEST else f"{kept[:_LONGEST]}..."


def _from_here(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _as_stated(path: Path, stated: Any) -> bool:
    return path.is_file() and isinstance(stated, Mapping) and describe_file(path) == dict(stated)


def _damage(open_: Any) -> str | None:
    try:
        open_()
    except DataError as error:
        return str(error)
    return None
