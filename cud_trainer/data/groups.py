"""Groups of samples (author, topic, source), told apart by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any


def group_labels(groups: Sequence[Any]) -> list[str]:
    """A name for the group of each sample, `[N]`: equal where the groups are, different where they differ.

    It is the value as text. Where another value has the same text (`None` and `"None"`, `1` and `"1"`), the one that is
    text stands in quotes. Gaps, `None` and NaN, are one group.
    """
    keys = [_key(group) for group in groups]
    kinds: dict[str, set[str]] = defaultdict(set)
    for kind, text in keys:
        kinds[text].add(kind)
    quoted = {text for text, those in kinds.items() if len(those) > 1}
    if quoted:  # what looks quoted already must not meet what now is
        quoted |= {text for text in kinds if text[:1] in "'\""}
    return [repr(text) if kind == "str" and text in quoted else text for kind, text in keys]


def check_groups(held_out: Any, seen: Any, column: str, name: str) -> None:
    """Raise `ValueError` naming the first group of the held-out samples that is also in the set `name`."""
    groups = {str(group) for group in seen}
    for group in held_out:
        if str(group) in groups:
            raise ValueError(f"held-out group {group!r} ({column}) is in the {name} dataset: a loss sees it")


def _key(group: Any) -> tuple[str, str]:
    if group is None or group != group:  # NaN
        return "gap", "None"
    if hasattr(group, "item") and not isinstance(group, str):
        group = group.item()  # a number of numpy
    return type(group).__name__, str(group)
