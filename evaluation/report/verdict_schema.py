"""The verdict in `results.json` as types: see `schema`, whose rules hold here too."""

from __future__ import annotations

from dataclasses import dataclass

from ..statistics import Interval

ANSWER = "answer probability"


@dataclass(kw_only=True)
class Judged:
    """One measure of the forget samples against the level of never-seen ones (see `verdict.judge`)."""

    measure: str
    state: str
    said: str
    against: str | None
    n: int
    left: Interval
    level: Interval | None = None
    difference: Interval | None = None
    above: list[str]
    below: int | None = None
    expected: float | None = None


@dataclass(kw_only=True)
class Cost:
    """What a set that was to be kept had and has; `lost`: the share of it that went; `warning`: more than 5%."""

    set: str
    measure: str
    n: int | None
    before: Interval
    after: Interval
    lost: float | None
    warning: bool


@dataclass(kw_only=True)
class Part:
    """What is left of some forget samples (all, a difficulty bucket, a group), and how many are above the line."""

    part: str
    n: int
    before: Interval | None = None
    after: Interval
    level: Interval | None = None
    above: int | None = None


@dataclass(kw_only=True)
class Leaking:
    """A forget sample of which much is left; `line`: what is above it counts."""

    sample_id: str
    after: float
    before: float | None = None
    level: float | None = None
    line: float | None = None
    above: bool | None = None
    bucket: int | None = None
    group: str | None = None


@dataclass(kw_only=True)
class Returned:
    """Whether something brings forget samples back: `answer` is yes, no, cannot be told or not tried."""

    how: str
    answer: str
    said: str


@dataclass(kw_only=True)
class Verdict:
    """Is it gone, what did it cost, for whom, was it only hidden. `by`: what the buckets among `parts` are made of."""

    state: str
    headline: str
    ids: list[str]
    rule: str
    judged: list[Judged]
    costs: list[Cost]
    cost: str
    by: str | None
    parts: list[Part]
    whom: str
    samples: list[Leaking]
    hidden: list[Returned]


@dataclass(kw_only=True)
class ArmVerdict:
    """The rule on the runs of one arm with one objective, each at its end. Figures are means over `seeds`; `states` and
    `above` (of `n` samples) are by seed; `hardest`: left of the hardest bucket; `level`: of never-seen samples."""

    objective: str
    arm: str
    seeds: list[int]
    states: list[str]
    n: int
    left: float
    hardest: float | None = None
    level: float | None = None
    above: list[int] | None = None
    costs: list[Cost]
    said: str


@dataclass(kw_only=True)
class Verdicts:
    """Of many runs: is it gone (`answer`, and how it was judged), of each arm, how they compare where they have kept
    equally much, and whether it was only hidden."""

    state: str
    answer: str
    headline: str
    rule: str
    arms: list[ArmVerdict]
    compared: list[str]
    hidden: list[Returned]
