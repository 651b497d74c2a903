"""Another objective for each bucket of difficulty: what may be mixed in one loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .registry import OBJECTIVES, Objective


@dataclass(frozen=True)
class Part:
    """An objective with its options; of a loss, the objective of some of the forget samples."""

    spec: Objective
    options: dict[str, Any]


def parts_by_bucket(given: Any, default: Part) -> dict[int, Part]:
    """The objective of every bucket that has one of its own, by the bucket's number.

    Args:
        given: `{bucket: name}` or `{bucket: {"objective": name, option: value}}`; 1 is the easiest bucket.
        default: of the samples of all other buckets.

    Raises:
        ValueError: for anything else, for what an objective does not have, and for objectives that cannot be mixed.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"objective_by_bucket must be a dictionary, got {given!r}")
    parts: dict[int, Part] = {}
    for key, value in given.items():
        bucket = int(key) if isinstance(key, str) and key.isdecimal() else key
        if isinstance(bucket, bool) or not isinstance(bucket, int) or bucket < 1:
            raise ValueError(f"objective_by_bucket goes by the numbers of buckets, 1 the easiest, got {key!r}")
        if bucket in parts:
            raise ValueError(f"objective_by_bucket has bucket {bucket} twice")
        options = dict(value) if isinstance(value, Mapping) else {"objective": value}
        name = options.pop("objective", None)
        if not isinstance(name, str):
            raise ValueError(
                f'objective_by_bucket: bucket {bucket} needs a name or {{"objective": name, ...}}, got {value!r}'
            )
        part = Part(OBJECTIVES.find(name), options)
        part.spec.check_options(options)
        if part.spec.split(options)[1]:
            raise ValueError(f"objective_by_bucket: no option of bucket {bucket} can go by sample")
        parts[bucket] = part
    if parts:
        _check_mixed([default, *parts.values()])
    return parts


def _check_mixed(parts: list[Part]) -> None:
    for part in parts:
        if "hidden" in part.spec.needs:
            raise ValueError(
                f"objective {part.spec.name!r} cannot be mixed with others by bucket: it reads hidden states, of which "
                "nothing else is trained"
            )
    sources = sorted({part.spec.alternative for part in parts if part.spec.alternative is not None})
    if len(sources) > 1:
        raise ValueError(
            f"objective_by_bucket: a sample has one alternative answer, but the objectives want {' and '.join(sources)}"
        )
