"""Options from the command line and a YAML file; whatever is wrong with them is one `ValueError`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, get_origin, get_type_hints

from trl import TrlParser

from ..typed import check_options, described, fits, shown
from .early import IMPORT, read_yaml
from .help import About, answer
from .imports import run_imports

IMPORT_HELP = (
    "Python files of yours that register objectives, steps, metrics, schedules or architectures (register_objective, "
    "...). They are run before options are checked: give only files that you trust."
)


def parse_options(
    kinds: Sequence[type],
    argv: Sequence[str],
    program: str,
    defaults: dict[str, Any] | None = None,
    *,
    about: About | None = None,
) -> tuple[Any, ...]:
    """An instance of every dataclass of `kinds`, from `argv` and the YAML file of `--config` in it.

    Args:
        defaults: options that hold where neither has them.
        about: what `--help` says, which ends the process.

    Raises:
        ValueError: for an unknown option, a value of another type, or a file that cannot be read, naming it.
    """
    parser = _Parser(kinds, prog=program)
    answer(argv, parser, kinds, about)
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
        self.hints[IMPORT] = list[str]
        super().add_argument(f"--{IMPORT}", nargs="+", default=[], help=IMPORT_HELP)

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
        run_imports(values[IMPORT])  # before any option is checked that may name what they register
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
