"""The key of the ids in what a study writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cud_trainer.data.ids import KEY_FILE, KEYED, IdKey, given_key, key_in
from cud_trainer.difficulty import DifficultyScores

from .options import SCORES, StudyArguments


def key_of_study(args: StudyArguments, folder: Path) -> IdKey:
    """The key of the ids in all that a study writes: the one that was given, that of the scores it is given, that of
    its folder, or a new one, which is not written yet.

    Raises:
        ValueError: for scores with ids of different keys: their samples could not be compared.
    """
    given, kept = given_key(), key_in(folder)
    if given is not None:
        return given
    found = {path: key for path in sorted(_scores_files([args.train, args.grid, args.arms])) if (key := _key_of(path))}
    keys = [*({folder: kept} if kept else {}).items(), *found.items()]
    other = next((path for path, key in keys if key != keys[0][1]), None)
    if other is not None:
        raise ValueError(
            f"the ids in {keys[0][0]} and {other} are made with different keys, and cannot be compared: score with one "
            "id_key, or choose another output_dir"
        )
    path = folder / KEY_FILE
    return replace(keys[0][1], path=path) if keys else IdKey.new(path)


def _scores_files(options: Any) -> set[str]:
    """All values of `difficulty_scores` anywhere in options."""
    if isinstance(options, dict):
        given = options.get(SCORES)
        named = {str(path) for path in (given if isinstance(given, list) else [given]) if path is not None}
        return named.union(*map(_scores_files, options.values()))
    return set().union(*map(_scores_files, options)) if isinstance(options, list) else set()


def _key_of(path: str) -> IdKey | None:
    """The key of the ids in a file of scores; `None` for other ids, and for a file that is refused later."""
    try:
        scores = DifficultyScores.load(path)
    except ValueError:
        return None
    return next(iter(scores.keys), None) if any(map(KEYED.match, scores.ids)) else None
