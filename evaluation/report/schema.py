"""`results.json` as types: what a report is made of, written and read by the same few rules.

- An attribute is the entry of its name, in the order in which they stand here.
- One whose default is `None` is left out as long as it is `None`; every other must be there.
- The entries of an `inline` one stand beside the others, without its name.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from ..statistics import Interval
from .cells import Cell, Missing
from .verdict_schema import Verdict, Verdicts

SCHEMA_VERSION = 1
INLINE = "inline"


def inline(*required: str) -> dict[str, Any]:
    """Metadata of an attribute whose entries stand beside the others; of a mapping, those that must be there."""
    return {INLINE: required}


@dataclass(kw_only=True)
class Head:
    """Of every `results.json`."""

    schema_version: int
    title: str
    created: str

    @classmethod
    def now(cls, title: str) -> Head:
        """The head of results that are made now."""
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return cls(schema_version=SCHEMA_VERSION, title=title, created=created)


@dataclass(kw_only=True)
class Run:
    """How the results were made: the command line, its seed, and facts of each kind by name."""

    command: str
    seed: int
    versions: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    seconds: dict[str, Any]


@dataclass(kw_only=True)
class BucketRow:
    """Means over one difficulty bucket; `bucket` counts from 1, the easiest."""

    bucket: int
    n: int
    metrics: dict[str, Interval] = field(metadata=inline())


@dataclass(kw_only=True)
class ResidualRow(BucketRow):
    """What is left of one difficulty bucket."""

    metrics: dict[str, Interval] = field(metadata=inline("probability"))


@dataclass(kw_only=True)
class Final:
    """The end of a run: every metric of every set, and of the forget set by bucket."""

    seed: int | None = None
    sets: dict[str, dict[str, Interval]] = field(metadata=inline("forget"))
    buckets: list[ResidualRow] | None = None


@dataclass(kw_only=True)
class CurvePoint:
    """A snapshot of a run: answer probability of the retain set, of the forget set, and of its buckets."""

    seed: int
    step: int | None = None
    retain: float
    forget: float
    buckets: list[float]


@dataclass(kw_only=True)
class Condition:
    """What is compared: the runs with one objective and one schedule, or one model."""

    name: str
    objective: str | None
    schedule: str | None
    retain_weight: float | None
    learning_rate: float | None
    passes: int | None = None
    seeds: list[int]
    curve: list[CurvePoint]
    final: Final


@dataclass(kw_only=True)
class PredictorRow:
    """How well one metric predicts what is left."""

    metric: str
    label: str
    kind: str
    spearman: Interval
    partial: Interval | None
    kendall: Interval | None = None
    auroc: Interval


@dataclass(kw_only=True)
class Ceiling:
    """How well what is left agrees with itself over seeds (see `statistics.ceiling`)."""

    agreement: Interval
    attainable: float | None
    n_seeds: int


@dataclass(kw_only=True)
class DifficultySection:
    """The predictors of what one objective leaves."""

    objective: str
    n: int
    target: str
    rows: list[PredictorRow]
    ceiling: Ceiling | None = None
    cud_minus_loss: Interval | None = None


@dataclass(kw_only=True)
class Difficulty:
    """Did difficulty predict what is left?"""

    note: str
    objectives: list[DifficultySection]


@dataclass(kw_only=True)
class EdgeRow:
    """An edge of a circuit and its score."""

    source: str
    destination: str
    value: float


@dataclass(kw_only=True)
class SignatureCorrelation:
    """Spearman correlation of one figure of the signature with what is left."""

    name: str
    spearman: Interval


@dataclass(kw_only=True)
class Circuits:
    """Circuits of easy and hard samples; `signature` names the figures in `buckets`."""

    n: int
    n_empty: int
    k: int
    note: str
    settings: dict[str, Any]
    layers: int
    heads: int
    kv_heads: int
    signature: list[str]
    buckets: list[BucketRow]
    mean_circuit: list[EdgeRow]
    difference: list[EdgeRow]
    spearman: list[SignatureCorrelation] | None = None


@dataclass(kw_only=True)
class LayerCurve:
    """Mean over the forget samples at every layer, the first layer first."""

    label: str
    values: list[Interval]


@dataclass(kw_only=True)
class Layers:
    """What every layer says: answer probability read off it (`lens`), and what its states take off the answer's mean
    log-probability when they are put into the original model (`drops`, nats)."""

    count: int
    lens: list[LayerCurve]
    drops: list[LayerCurve]


@dataclass(kw_only=True)
class MatchedRow:
    """What one schedule leaves at a level of retain utility, `extraction` strength of all, and the step there."""

    schedule: str
    retain_weight: float | None
    learning_rate: float | None = None
    forget: Interval | None
    hardest_bucket: Interval | None
    extraction: Interval | None = None
    worst_quarter: float | None = None
    steps: float | None
    seconds: float | None = None
    reason: str | None


@dataclass(kw_only=True)
class MatchedDifference:
    """One schedule less another, paired over samples."""

    schedule: str
    against: str
    forget: Interval
    hardest_bucket: Interval


@dataclass(kw_only=True)
class Matched:
    """The schedules of one objective at matched retain utility."""

    objective: str
    retain_level: float
    rows: list[MatchedRow]
    difference: MatchedDifference | None


@dataclass(kw_only=True)
class Trial:
    """A setting that was tried, and whether it is the one that is reported."""

    objective: str
    schedule: str
    retain_weight: float | None
    forget: float
    hardest_bucket: float
    chosen: bool


@dataclass(kw_only=True)
class Row:
    """A row of a table."""

    label: str
    cells: list[Cell]


@dataclass(kw_only=True)
class Table:
    """A table; every row has a cell per column."""

    id: str
    title: str
    note: str
    columns: list[str]
    rows: list[Row]


@dataclass(kw_only=True)
class AttackRow:
    """What an attack on the weights changes of answer probability: of the forget samples, of never-seen ones, and the
    difference, which alone says that something was hidden. `over`: what the intervals are over."""

    attack: str
    condition: str
    n: int
    over: str
    change: Interval
    n_control: int | None = None
    control: Interval | None = None
    beyond: Interval | None = None


@dataclass(kw_only=True)
class Against:
    """One arm less another, paired by seed (see `evaluation.decision.Comparison`)."""

    arm: str
    verdict: str
    difference: Interval
    change: Interval
    left: Interval
    seeds: list[int]
    won: list[int]
    lost: list[int]


@dataclass(kw_only=True)
class Decided:
    """Whether the difficulty of one arm earns its place with one objective: yes, no or undecided."""

    objective: str
    arm: str
    verdict: str
    reason: str
    against: list[Against]


@dataclass(kw_only=True)
class Decisions:
    """The rule, stated before any run, and what it says."""

    rule: str
    arms: list[Decided]


@dataclass(kw_only=True)
class Results:
    """All of `results.json`. The page, the pictures and the summary show nothing else."""

    head: Head = field(metadata=inline())
    verdict: Verdict | None = None
    verdicts: Verdicts | None = None
    conditions: list[Condition] | None = None
    findings: list[str]
    before: dict[str, dict[str, Interval]] | None = None
    difficulty: Difficulty | None = None
    circuits: Circuits | None = None
    layers: Layers | None = None
    matched: list[Matched] | None = None
    retain_weight_fit: list[Trial] | None = None
    fit_note: str | None = None
    decision: Decisions | None = None
    attacks: list[AttackRow] | None = None
    tables: list[Table] | None = None
    run: Run


def jsonable(value: Any) -> Any:
    """Plain JSON values: parts of results as mappings, numpy and torch values unpacked, NaN and infinity as null."""
    if isinstance(value, Missing):
        return {"value": None, "reason": value.reason}
    if is_dataclass(value):
        return jsonable(_entries(value))
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _entries(part: Any) -> dict[str, Any]:
    """The entries that a part of results is written as."""
    entries: dict[str, Any] = {}
    for attribute in fields(part):
        value = getattr(part, attribute.name)
        if INLINE in attribute.metadata:
            entries |= _entries(value) if is_dataclass(value) else value
        elif value is not None or attribute.default is MISSING:
            entries[attribute.name] = value
    return entries


def read_results(plain: Mapping[str, Any]) -> Results:
    """`Results` of what `results.json` holds, null as NaN where a number must be.

    Raises:
        ValueError: naming a required entry that is missing, or for another schema version.
    """
    results = _read_part(Results, plain, "")
    if results.head.schema_version != SCHEMA_VERSION:
        raise ValueError(f"results have schema version {results.head.schema_version}, this writes {SCHEMA_VERSION}")
    return results


def _read(kind: Any, value: Any, path: str) -> Any:
    """`value`, plain JSON at `path`, as the type `kind`."""
    if value is None:
        return math.nan if kind is float else None
    if kind is Interval:
        middle, low, high = (_read(float, value.get(side), path) for side in ("value", "low", "high"))
        return Interval(middle, low, high, value.get("reason"))
    if kind == Cell:
        if not isinstance(value, Mapping):
            return value
        return _read(Interval, value, path) if "low" in value else Missing(value.get("reason") or "")
    if is_dataclass(kind):
        return _read_part(kind, value, path)
    inner = [part for part in get_args(kind) if part is not NoneType]
    if get_origin(kind) is list:
        return [_read(inner[0], item, f"{path}.{number}") for number, item in enumerate(value)]
    if get_origin(kind) is dict:
        return {key: _read(inner[1], item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
    return _read(inner[0], value, path) if len(inner) == 1 else value


def _read_part(kind: Any, value: Mapping[str, Any], path: str) -> Any:
    """`value` as a dataclass of this module."""
    types, attributes = get_type_hints(kind), fields(kind)
    named = {attribute.name for attribute in attributes if INLINE not in attribute.metadata}
    entries: dict[str, Any] = {}
    for attribute in attributes:
        name = attribute.name
        inlined = attribute.metadata.get(INLINE, ())
        optional = INLINE in attribute.metadata or attribute.default is not MISSING
        for needed in (*inlined, *(() if optional else (name,))):
            if needed not in value:
                raise ValueError(f"results have no '{f'{path}.{needed}'.lstrip('.')}'")
        if INLINE not in attribute.metadata:
            if name in value:
                entries[name] = _read(types[name], value[name], f"{path}.{name}".lstrip("."))
        elif is_dataclass(types[name]):
            entries[name] = _read_part(types[name], value, path)
        else:
            rest = {key: item for key, item in value.items() if key not in named}
            entries[name] = _read(types[name], rest, path)
    return kind(**entries)
