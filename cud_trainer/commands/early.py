"""What can be refused before torch is imported: names that nobody registers, files that are not there.

Whatever passes here is checked again where it is used, with all that is known there; nothing is refused here that would
be accepted there.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from .names import find

IMPORT, CONFIG = "import", "config"
# What a data file ends in (a test compares them with those that `data` reads, which needs torch).
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".xlsx", ".gz")
# What is registered, by the option that names it; and what these options may be besides.
NAMES = {
    "objective": "objective",
    "step": "step",
    "schedule": "schedule",
    "difficulty": "difficulty metric",
    "metrics": "difficulty metric",
}
NO_NAMES = {"difficulty": {"", "none", "None", "given"}}
ORACLE = "oracle"  # as the difficulty of an arm of a study: what uniform runs of the other seeds have left
# What options of files and folders say of one that is not there; `None` where it may also be a hub id.
FILES: dict[str, str | None] = {
    "model_name_or_path": None,
    "original_model": None,
    "reference_model": None,
    "tofu": None,
    "forget_dataset": None,
    "retain_dataset": None,
    "utility_dataset": None,
    "heldout_dataset": None,
    "holdout_dataset": None,
    "neighbour_dataset": None,
    "nli_model": None,
    "lm_eval_include": None,
    "difficulty_scores": "cannot read difficulty scores from {path}",
    "scores": "cannot read difficulty scores from {path}",
    "retain_difficulty_scores": "cannot read difficulty scores from {path}",
    "circuits": "cannot read circuits from {path}",
    "anchor_bank": "cannot read an anchor bank from {path}",
    "open_unlearning": "cannot read {path}",
    "original_open_unlearning": "cannot read {path}",
    "reference_open_unlearning": "cannot read {path}",
}


def check_early(command: str, argv: Sequence[str]) -> None:
    """Raise `ValueError` for a name or a file in a command line, or in its YAML file, that cannot be meant.

    Args:
        command: a subcommand of `cud`.
        argv: what follows it.
    """
    options = read_options(argv)
    for option, value in options.items():
        for path in value if isinstance(value, list) else [value]:
            check_file(option, path)
    used = list(_of_study(options) if command == "study" else options.items())
    for option, value in used:
        if command == "study" and option == "difficulty_scores":
            check_file(option, value)
    if options.get(IMPORT) or options.get("architecture"):
        return  # they may register what is named
    for option, value in used:
        allowed = NO_NAMES.get(option, set()) | ({ORACLE} if command == "study" else set())
        for name in value if isinstance(value, list) else [value]:
            if option in NAMES and isinstance(name, str) and name not in allowed:
                for part in name.split("+") if option == "schedule" else [name]:
                    find(NAMES[option], part.strip())


def check_file(option: str, path: Any) -> None:
    """Raise `ValueError` when this option names a file or a folder that is not there."""
    if option not in FILES or not isinstance(path, str) or not path:
        return
    said = FILES[option]
    if said is None and is_missing(path):
        what = option.removesuffix("_dataset")
        raise ValueError(
            f"{option}: there is no {path}"
            if what == option
            else f"cannot load the {what} dataset {path!r}: {what} dataset {path} does not exist"
        )
    if said is not None and not Path(path).expanduser().exists():
        raise ValueError(f"{said.format(path=path)}: there is no such file")


def is_missing(source: str) -> bool:
    """Whether `source` can only be a file or a folder (not a hub id, nor a pattern), and is not there."""
    path = Path(source).expanduser()
    if path.exists() or any(mark in source for mark in "*?["):
        return False
    return path.suffix.lower() in DATA_SUFFIXES or source[:1] in ("/", "~", ".")


def read_options(argv: Sequence[str]) -> dict[str, Any]:
    """Options of a command line and of its YAML file, by name: a text, a list of texts, or what YAML makes of it.

    Raises:
        ValueError: for a YAML file that cannot be read.
    """
    given: dict[str, list[str]] = {}
    values: list[str] = []
    for text in argv:
        if text.startswith("--"):
            name, equals, value = text[2:].partition("=")
            values = given[name.replace("-", "_")] = [value] if equals else []
        else:
            values.append(text)
    options: dict[str, Any] = {name: value[0] if len(value) == 1 else value for name, value in given.items()}
    config = options.get(CONFIG)
    return {**read_yaml(config), **options} if isinstance(config, str) and config else options


def _of_study(options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options of `cud train` that the cells of a study have, as far as its mappings are well-formed."""
    grid, arms, train = (_mapping(options.get(name)) for name in ("grid", "arms", "train"))
    varied: set[str] = set()
    for part in grid if isinstance(grid, list) else [grid]:
        if isinstance(part, dict):
            varied |= set(part)
            yield from ((name, value) for name, values in part.items() if isinstance(values, list) for value in values)
    for arm in arms.values() if isinstance(arms, dict) else ():
        if isinstance(arm, dict):
            varied |= set(arm)
            yield from arm.items()
    path, train = options.get("recipe"), train if isinstance(train, dict) else {}
    recipe = read_yaml(path) if isinstance(path, str) and path else {}
    yield from ((name, value) for name, value in {**recipe, **train}.items() if name not in varied)


def _mapping(value: Any) -> Any:
    """What a text of JSON says; anything else as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value


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
