"""Configuration: a dataclass for each command, filled from YAML (`--config`), then from flags; flags win."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from recllm.errors import DataError
from recllm.quiet import hush

Config = TypeVar("Config")


def parse_config(
    config: type[Config], argv: Sequence[str] | None = None, *, prog: str | None = None
) -> Config:
    """Builds `config` from command-line arguments.

    Fields without a default are required. Fields annotated `tyro.conf.Positional` are given without a flag,
    all others as `--field-name value`. `--config FILE.yaml`, or a first argument that ends so, sets fields by
    name before the flags are read.

    Args:
        config: A dataclass; the string below each field is its help.
        argv: Arguments without the program name; `sys.argv[1:]` when None.
        prog: The name that the help prints.

    Raises:
        DataError: The YAML file is missing or malformed, has an unknown key (the nearest known one is named),
        or a
            value of the wrong type.
        SystemExit: The flags are unusable (status 2, with a message), or `--help` was asked for.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    path = _take_config_flag(argv, first=getattr(config, "yaml_first", True))
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_yaml(path, config)
    required = [field.name for field in dataclasses.fields(config) if _is_required(field)]
    default = config(**{**dict.fromkeys(required, tyro.MISSING), **values})
    return tyro.cli(
        config,
        args=argv,
        prog=prog,
        default=default,
        description=f"{(config.__doc__ or '').strip()}\n\nOptions can also come from YAML: --config FILE.",
        config=(tyro.conf.OmitArgPrefixes,),
    )


def run_command(
    config: type[Config] | Callable[[Sequence[str]], type[Config]],
    command: Callable[[Config], None],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> None:
    """Parses the arguments and runs `command`; a `DataError` becomes one message and exit status 1.

    Args:
        config: A dataclass, or a function that chooses it by the arguments.
        command: What is run with it.
        argv: Arguments without the program name; `sys.argv[1:]` when None.
        prog: The name that the help prints.
    """
    hush()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        chosen = config if isinstance(config, type) else config(argv)
        command(parse_config(chosen, argv, prog=prog))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        raise
    except OSError as error:  # no permission, a folder where a file should be, a disk that went away
        print(
            f"error: {error.filename or ''}: {error.strerror or error}".replace(" : ", " "), file=sys.stderr
        )
        raise SystemExit(1) from None


def refuse_given(options: Any, names: Iterable[str], because: str) -> None:
    """Refuses options that would have no effect: what is asked for is done or is an error.

    Args:
        options: A dataclass of options.
        names: Fields that are not used here. One counts as given where it differs from its default.
        because: Why they are not used, and what to do; follows their flags.

    Raises:
        DataError: Some are given; it names all of them.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}
    given = [name for name in names if getattr(options, name) != _default_of(fields[name])]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise DataError(f"{flags} {'has' if len(given) == 1 else 'have'} no effect {because}")


def _default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def peek(name: str, argv: Sequence[str]) -> Any:
    """Returns one option before the class of the others is known: of the flags, else of the YAML file.

    Raises:
        DataError: The YAML file is missing or malformed.
    """
    rest = list(argv)
    path = _take_config_flag(rest)
    flag = f"--{name.replace('_', '-')}"
    for place, argument in enumerate(rest):
        if argument == flag and place + 1 < len(rest):
            return rest[place + 1]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None if path is None else _load_yaml(path).get(name)


def _take_config_flag(argv: list[str], *, first: bool = True) -> Path | None:
    """Takes the YAML file from the arguments; `first`: also where it is the first of them, without a flag."""
    if first and argv and argv[0].endswith((".yaml", ".yml")):
        return Path(argv.pop(0))
    for position, argument in enumerate(argv):
        if argument == "--config":
            if position + 1 == len(argv):
                raise DataError("--config needs a YAML file")
            path = argv[position + 1]
            del argv[position : position + 2]
            return Path(path)
        if argument.startswith("--config="):
            del argv[position]
            return Path(argument.removeprefix("--config="))
    return None


def _loader() -> Any:
    """Returns a safe loader for which yes, no, on and off are words, as in YAML 1.2, and no booleans."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        pass

    booleans = re.compile("^(?:true|True|TRUE|false|False|FALSE)$")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:bool"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", booleans, list("tTfF"))
    return Loader


def _load_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _loader())
    except FileNotFoundError:
        raise DataError(f"--config {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"--config {path}: not readable as YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise DataError(f"--config {path}: expected `key: value` lines at the top level")
    return content


def _read_yaml(path: Path, config: type) -> dict[str, Any]:
    content = _load_yaml(path)
    hints = typing.get_type_hints(config)
    for key in content:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            raise DataError(f"--config {path}: unknown key {key!r}; the nearest known key is {near[0]!r}")
    return {key: _convert(value, hints[key], f"--config {path}: {key}") for key, value in content.items()}


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Checks one YAML value against a field's type; converts lists to tuples, text to paths, nothing else."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(value, arguments[0], where)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(value, option, where)
            except DataError:
                continue
    elif origin is typing.Literal and value in arguments:
        return value
    elif origin is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) == len(value):
            return tuple(_convert(entry, each, where) for entry, each in zip(value, arguments, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {_convert(k, arguments[0], where): _convert(v, arguments[1], where) for k, v in value.items()}
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is type(None) and value is None:
        return None
    elif isinstance(hint, type) and origin is None and type(value) is hint:
        return value
    hint_of_yaml = ""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value):
        hint_of_yaml = " (YAML takes it for text; write 1.0e-3 for 1e-3)"
    raise DataError(f"{where}: {value!r} is not of type {_name(hint)}{hint_of_yaml}")


def _name(hint: Any) -> str:
    return (
        hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("pathlib.", "")
    )


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
