"""Options from the command line and a YAML file; whatever is wrong with them is one `ValueError`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_origin, get_type_hints

import yaml
from trl import TrlParser

from ..typed import check_options, described, fits, shown


def parse_options(
    kinds: Sequence[type], argv: Sequence[str], program: str, defaults: dict[str, Any] | None = None
) -> tuple[Any, ...]:
    """An instance of every dataclass of `kinds`, from `argv` and the YAML file of `--config` in it.

    Args:
        defaults: options that hold where neither has them.

    Raises:
        ValueError: for an unknown option, a value of another type, or a file that cannot be read, naming it.
    """
    parser = _Parser(kinds, prog=program)
    parser.set_defaults_with_config(**(defaults or {}))
    return parser.parse_args_and_config(argv)


class _Parser(TrlParser):
    """TRL's parser, with errors to catch, mappings as JSON on the command line, and a YAML file that is checked."""

    def __init__(self, kinds: Sequence[type], **kwargs: Any) -> None:
        super().__init__(kinds, **kwargs)
        # Of every option; other fields are no options, nor are class variables.
        options = {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}
        hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
        self.hints = {name: hint for name, hint in hints.items() if name in options}

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As in the base class; a mapping is read as JSON."""
        hint = options.get("type")
        if get_origin(hint) is dict or hint is Any:
            options["type"] = _mapping
        action = super().add_argument(*names, **options)
        if action.choices is not None:
            self.__dict__.setdefault("choices", {})[action.dest] = list(action.choices)
        return action

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse_args_and_config(self, args: Iterable[str] | None = None, *_: Any, **__: Any) -> tuple[Any, ...]:
        configs, rest = [], iter(args or ())
        command_line = []
        for text in rest:
            if text == "--config":
                configs.append(next(rest, ""))
            elif text.startswith("--config="):
                configs.append(text.removeprefix("--config="))
            else:
                command_line.append(text)
        if len(configs) > 1:
            raise ValueError("--config is given twice")
        if configs:
            self.set_defaults_with_config(**self._read(configs[0]))
        namespace, unknown = self.parse_known_args(command_line)
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}" if unknown[0][:1] == "-" else f"stray {unknown[0]!r}")
        values = {name: _expanded(value) for name, value in vars(namespace).items()}
        for name, choices in self.__dict__.get("choices", {}).items():  # argparse does not look at a file's
            if values[name] is not None and values[name] not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {shown(values[name])}")
        made = tuple(
            kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.init})
            for kind in self.dataclass_types
        )
        for options in made:
            check_options(options, strict=False)
        return made

    def _read(self, path: str) -> dict[str, Any]:
        """The options of a YAML file, each of the type of its field."""
        config = read_yaml(path)
        variables = config.pop("env", None) or {}  # as in TRL
        if not isinstance(variables, dict):
            raise ValueError(f"{path}: env must be a mapping of environment variables, got {variables!r}")
        for name, value in config.items():
            if name not in self.hints:
                raise ValueError(f"{path}: unknown option {name!r}")
            if isinstance(value, str) and not fits(value, self.hints[name]) and not fits([value], self.hints[name]):
                continue  # the parser converts it, as on the command line
            if not fits(value, self.hints[name]):
                if not fits([value], self.hints[name]):
                    raise ValueError(f"{path}: {name} must be {described(self.hints[name])}, got {value!r}")
                config[name] = [value]
        for name, value in variables.items():
            if not name or "=" in name or "\0" in f"{name}{value}":
                raise ValueError(f"{path}: env has {name!r}, which is no name of an environment variable")
            os.environ[name] = str(value)
        return config


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, of plain values: strings, numbers, booleans, null, lists and mappings.

    Raises:
        ValueError: naming the file, when it is missing, no YAML in UTF-8, no mapping, or has a key twice.
    """
    try:
        config = yaml.load(Path(path).read_bytes().decode("utf-8-sig"), Loader=_Loader)
        json.dumps(config)
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"cannot read the configuration {path!r}: it is not UTF-8") from None
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the configuration {path!r}: {str(error)[:300]}") from None
    if not isinstance(config, dict):
        raise ValueError(f"configuration {path!r} must be a mapping of options, it is a {type(config).__name__}")
    return config


class _Loader(yaml.SafeLoader):
    """Without dates, and without silently taking the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names: set[Any] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is no string", key.start_mark)
            if name in names:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is there twice", key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


def _expanded(value: Any) -> Any:
    """A path that begins with ~, in the home directory that it means."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith(("~/", "~\\")) else value


def _mapping(text: str) -> dict[str, Any]:
    """A mapping on the command line, as JSON."""
    try:
        mapping = json.loads(text)
    except (ValueError, RecursionError):
        mapping = None
    if not isinstance(mapping, dict):
        raise argparse.ArgumentTypeError('not a JSON object such as {"beta": 0.1}')
    return mapping
