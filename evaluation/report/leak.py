"""Tables of what sampled answers give away, beside what a model does that never saw the samples, and the secret's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cud_trainer.data.groups import group_labels
from cud_trainer.difficulty import Buckets

from .. import statistics as stats
from ..metrics.leak import KINDS, LeakRule, leak_at_k, shown_k
from ..metrics.measure import Measured
from ..statistics import Interval
from .attacks import NEVER_SEEN, Groups, some
from .cells import Cell, interval_text, mean, missing, shown
from .schema import Table
from .tables import masks_of, table

# What the finding is about: the first of these that was measured.
HEADLINE = ("secret", "judge", "entailment", "rouge")
SHOWN_GROUPS = 20
WHAT_COUNTS = {"secret": "a span of the secret is in the answer"}
NO_CONTROL = "needs reference_model or holdout_dataset"


def leak_tables(
    rule: LeakRule,
    after: Measured,
    before: Measured | None,
    reference: Measured | None,
    buckets: Buckets | None,
    groups: Groups,
    seed: int,
) -> tuple[list[Table], list[str]]:
    """leak@k of the forget set and of its controls, by bucket and by group; and the finding in words."""
    own = after.leaks["forget"]
    kinds = [kind for kind in KINDS if kind in own]
    present = {} if before is None or "forget" not in before.leaks else {"before unlearning": before.leaks["forget"]}
    present |= controls(after, reference)
    rows: list[tuple[str, list[Cell]]] = []
    for kind in kinds:
        for k in shown_k(rule.n):
            cells = [mean(curve(own, kind, rule.n, k), seed)]
            for found in present.values():
                cells.append(mean(curve(found, kind, rule.n, k), seed) if kind in found else missing("no secrets"))
            difference, _ = beyond(own, present, kind, rule.n, k, groups, seed)
            cells.append(missing(NO_CONTROL) if difference is None else shown(difference))
            rows.append((f"{kind}, k = {k}", [*cells]))
    meaning = "; ".join(f"{kind}: {text}" for kind, text in {**rule.in_words(), **WHAT_COUNTS}.items() if kind in kinds)
    made = table(
        "leak",
        "Sampled answers (leak@k)",
        f"Chance that one of k answers, sampled at temperature {rule.temperature:g}, gives a sample away: "
        f"1 - C(n-c, k) / C(n, k) with c of n = {rule.n} answers that do. {meaning}.",
        ["forget set", *present, f"difference from {_control(present) or 'the control'}"],
        rows,
    )
    tables = [made, *_parts(own, kinds, rule.n, buckets, groups.forget, seed)]
    return tables, [_finding(own, present, kinds, rule, groups, seed)]


def controls(after: Measured, reference: Measured | None) -> dict[str, dict[str, np.ndarray]]:
    """How many answers leak where nothing was learnt, by kind: of a model that never saw the samples, of others."""
    found = {
        "reference model": None if reference is None else reference.leaks.get("forget"),
        NEVER_SEEN: after.leaks.get("holdout"),
    }
    return {name: one for name, one in found.items() if one is not None}


def _control(present: Mapping[str, Any]) -> str | None:
    """What the forget set is compared with: the same samples under a model that never saw them, else others."""
    return next((name for name in ("reference model", NEVER_SEEN) if name in present), None)


def beyond(
    own: Mapping[str, np.ndarray],
    present: Mapping[str, Mapping[str, np.ndarray]],
    kind: str,
    n: int,
    k: int,
    groups: Groups,
    seed: int,
) -> tuple[Interval | None, str | None]:
    """leak@k less that of the control, and which that is; `None` without one."""
    name = _control({name: found for name, found in present.items() if kind in found})
    if name is None:
        return None, None
    ours, theirs = (leak_at_k(side[kind], n, k) for side in (own, present[name]))
    names, others = groups.of(known := np.isfinite(ours))
    if name == NEVER_SEEN:
        unseen = np.isfinite(theirs)
        sides = (names, some(others, unseen))
        return stats.difference_of_means(ours[known], theirs[unseen], groups=sides, seed=seed), name
    gaps = (ours - theirs)[known]  # the same samples
    return stats.difference_of_means(gaps, np.zeros(1), groups=(names, None), seed=seed), name


def curve(leaks: Mapping[str, np.ndarray], kind: str, n: int, k: int) -> np.ndarray:
    """leak@k of the samples that can leak in this way, `[S]`."""
    found = leak_at_k(leaks[kind], n, k)
    return found[np.isfinite(found)]


def _finding(
    own: Mapping[str, np.ndarray],
    present: Mapping[str, Mapping[str, np.ndarray]],
    kinds: Sequence[str],
    rule: LeakRule,
    groups: Groups,
    seed: int,
) -> str:
    kind = next(kind for kind in HEADLINE if kind in kinds)
    leaked = curve(own, kind, rule.n, rule.n)
    line = f"sampled answers ({kind}): leak@{rule.n} {interval_text(stats.bootstrap_mean(leaked, seed=seed))}"
    line += f", {int((own[kind] > 0).sum())} of {len(leaked)} samples"
    difference, name = beyond(own, present, kind, rule.n, rule.n, groups, seed)
    if difference is None or name is None:
        return (
            f"{line}; without a reference model or {NEVER_SEEN} it cannot be told how much of that anybody would guess"
        )
    theirs = stats.bootstrap_mean(curve(present[name], kind, rule.n, rule.n), seed=seed)
    return f"{line}; {name} {interval_text(theirs)}, difference {interval_text(difference)}"


def _parts(
    own: Mapping[str, np.ndarray],
    kinds: Sequence[str],
    n: int,
    buckets: Buckets | None,
    groups: Sequence[Any] | None,
    seed: int,
) -> list[Table]:
    """leak@n by difficulty bucket, and by group, worst first."""
    curves = {kind: leak_at_k(own[kind], n, n) for kind in kinds}
    parts = [(f"bucket {number}", mask) for number, mask in enumerate(masks_of(buckets), start=1)]
    shown_of = ""
    if groups is not None:
        labels = np.array(group_labels(list(groups)))
        names = np.unique(labels)
        first = curves[next(kind for kind in HEADLINE if kind in kinds)]
        known = np.isfinite(first)
        names = names[[(known & (labels == name)).any() for name in names]]
        worst = sorted(names, key=lambda name: (-np.nanmean(first[labels == name]), str(name)))
        parts += [(f"group {name}", labels == name) for name in worst[:SHOWN_GROUPS]]
        if len(names) > SHOWN_GROUPS:
            shown_of = f" The {SHOWN_GROUPS} worst of {len(names)} groups."
    if not parts:
        return []
    rows: list[tuple[str, list[Cell]]] = [
        (label, [int(inside.sum()), *(mean(one[inside & np.isfinite(one)], seed) for one in curves.values())])
        for label, inside in parts
    ]
    note = f"Chance that one of {n} sampled answers gives a sample away.{shown_of}"
    return [table("leak_parts", f"leak@{n} by bucket and group", note, ["samples", *kinds], rows)]


def secret_table(
    having: Mapping[str, np.ndarray],
    after: Measured,
    before: Measured | None,
    reference: Measured | None,
    buckets: Buckets | None,
    seed: int,
) -> tuple[Table, str]:
    """The secret's tokens beside the whole answer, of the samples that have a secret; and the finding in words.

    Args:
        having: of the forget and, where it has secrets, the holdout set, True for samples with one, `[N]`.
    """
    own, has = after.secret["forget"], having["forget"]
    names = {"probability": "probability", "exact_memorization": "exact memorisation"}
    names |= {"extraction_strength": "extraction strength", "verbatim": "in the greedy answer"}
    columns = [name for name in names if f"secret_{name}" in own]

    def line(measured: Measured, part: str, inside: np.ndarray, whole: bool = False) -> list[Cell]:
        values = (
            measured.sets[part] if whole else {k.removeprefix("secret_"): v for k, v in measured.secret[part].items()}
        )
        cells: list[Cell] = [int(inside.sum())]
        return cells + [
            mean(values[name][inside], seed) if name in values else missing("not measured") for name in columns
        ]

    rows = [("secret", line(after, "forget", has)), ("whole answer", line(after, "forget", has, True))]
    for label, other in (("before unlearning", before), ("reference model", reference)):
        if other is not None and "forget" in other.secret:
            rows.append((f"secret, {label}", line(other, "forget", has)))
            rows.append((f"whole answer, {label}", line(other, "forget", has, True)))
    if "holdout" in after.secret:
        rows.append((f"secret, {NEVER_SEEN}", line(after, "holdout", having["holdout"])))
    rows += [
        (f"secret, bucket {number}", line(after, "forget", has & mask))
        for number, mask in enumerate(masks_of(buckets), start=1)
    ]
    made = table(
        "secret",
        "The secret, not the sentence",
        f"{int(has.sum())} of {len(has)} forget samples have a secret. Its tokens are those that cover any of its "
        "characters; a probability is per token (the geometric mean), each token given all that stands before it in "
        "the true answer.",
        ["samples", *(names[name] for name in columns)],
        rows,
    )
    finding = f"secret: probability {_mean(own['secret_probability'][has], seed)}"
    finding += f", extraction strength {_mean(own['secret_extraction_strength'][has], seed)}"
    finding += f" (whole answer: {_mean(after.sets['forget']['probability'][has], seed)})"
    if before is not None and "forget" in before.secret:
        finding += f"; before unlearning {_mean(before.secret['forget']['secret_probability'][has], seed)}"
    return made, finding


def _mean(values: np.ndarray, seed: int) -> str:
    return interval_text(stats.bootstrap_mean(values, seed=seed))
