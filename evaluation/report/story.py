"""The top of a report: is it gone, what did it cost, for whom, was it only hidden. Sentences and their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cud_trainer.data.groups import group_labels
from cud_trainer.difficulty import Buckets
from cud_trainer.training.residual import COSTLY, share_lost

from .. import statistics as stats
from ..metrics.leak import LeakRule
from ..metrics.measure import Measured
from ..statistics import Interval
from .attacks import VISIBLE, Groups, attack_row, judged, some
from .collateral import KEPT
from .leak import HEADLINE, beyond, controls
from .schema import AttackRow
from .tables import masks_of
from .verdict import FORGOTTEN, HIDDEN, MARGIN, OVER, RULE, WORST_FIRST, Judgement, judge
from .verdict import said as judgement_said
from .verdict_schema import ANSWER, Cost, Judged, Leaking, Part, Returned, Verdict

NO_GROUPS = Groups()
SHOWN = 10  # samples, and ids in a sentence
GROUPS_SHOWN = 5
YES, NO, UNTOLD, UNTRIED = "yes", "no", "cannot be told", "not tried"
SECRET = "probability of the secret"
COSTS = {"probability": ANSWER, "verbatim": "answers said word by word"}


@dataclass(frozen=True)
class Needs:
    """What a question that stays open needs, by the options of the command; those of `cud evaluate` by default."""

    level: str = "--reference_model, --holdout_dataset"
    before: str = "--original_model"
    kept: str = "--retain_dataset, --heldout_dataset"
    parts: str = "By difficulty needs --scores, by group --group_column."
    relearning: str = "--relearn_samples 4"
    quantisation: str = "--quantize 8 4"
    rewording: str = "needs a column paraphrased_question in the forget set"
    sampled: str = "--samples 8"


@dataclass(frozen=True)
class Evidence:
    """What the top of a report is made of.

    Attributes:
        ids: of the forget samples.
        after, before, reference: of the unlearned model, the original one and one that never saw the forget samples.
        buckets, groups: of the forget samples; the groups of never-seen samples, too.
        secret: of the forget and the holdout set, True for samples with a secret.
        attacks: rows of what was done to the weights.
        leak: how answers were sampled; `None` where none were.
        wrong: why the model cannot have forgotten, whatever it says.
        needs: what questions that stay open need.
    """

    ids: Sequence[str]
    after: Measured
    before: Measured | None = None
    reference: Measured | None = None
    buckets: Buckets | None = None
    groups: Groups = NO_GROUPS
    secret: Mapping[str, np.ndarray] | None = None
    attacks: Sequence[AttackRow] = ()
    leak: LeakRule | None = None
    wrong: str | None = None
    needs: Needs = Needs()


def verdict_of(known: Evidence, seed: int) -> Verdict:
    """The whole top of the report."""
    found, left = _judged(known, "answer", seed)
    rows = [_row(known.ids, found, left, ANSWER, seed)]
    if known.secret is not None and known.secret["forget"].any():
        has = known.secret["forget"]
        own, values = _judged(known, "secret", seed)
        ids = [name for name, one in zip(known.ids, has, strict=True) if one]
        rows.append(_row(ids, own, values, SECRET, seed))
    rows.sort(key=lambda row: WORST_FIRST.index(row.state))  # stable: the answer first
    hidden = returned(known, seed)
    back = [row.how for row in hidden if row.answer == YES]
    state, headline = rows[0].state, rows[0].said
    if state in (FORGOTTEN, OVER) and back:
        state = HIDDEN
        headline = f"{headline} But part of it was only hidden: see {', '.join(back)}."
    if known.wrong is not None:
        headline = f"{known.wrong[0].upper()}{known.wrong[1:]}. {headline}"
    costs = _costs(known, seed)
    parts = _parts(known, found, left, seed)
    return Verdict(
        state=state,
        headline=headline,
        ids=rows[0].above[:SHOWN],
        rule=RULE,
        judged=rows,
        costs=costs,
        cost=_cost_said(costs, known),
        by=None if known.buckets is None else known.buckets.metric,
        parts=parts,
        whom=_whom_said(known, parts, found),
        samples=_samples(known, found, left),
        hidden=hidden,
    )


def _judged(known: Evidence, what: str, seed: int) -> tuple[Judgement, np.ndarray]:
    """The judgement of the answer or of the secret alone, and what is left of each sample that has one."""
    size = len(known.ids)
    rows = np.ones(size, dtype=bool) if what == "answer" or known.secret is None else known.secret["forget"]

    def read(measured: Measured | None, part: str) -> np.ndarray | None:
        if measured is None:
            return None
        if what == "answer":
            return None if part not in measured.sets else measured.sets[part]["probability"]
        has = None if known.secret is None else known.secret.get(part)
        if part not in measured.secret or has is None or not has.any():
            return None
        return measured.secret[part]["secret_probability"][has]

    left = read(known.after, "forget")
    assert left is not None
    others = None if known.groups.control is None else list(known.groups.control)
    if others is not None and what == "secret" and known.secret is not None and "holdout" in known.secret:
        others = some(others, known.secret["holdout"])
    found = judge(
        left,
        read(known.reference, "forget"),
        read(known.after, "holdout"),
        read(known.reference, "holdout"),
        groups=(some(known.groups.forget, rows), others),
        seed=seed,
    )
    if found.against is None:
        found = replace(found, reason=f"{found.reason} ({known.needs.level})")
    return found, left


def _row(ids: Sequence[str], found: Judgement, left: np.ndarray, what: str, seed: int) -> Judged:
    above: list[str] = []
    if found.above is not None:
        above = [ids[place] for place in _most(found, left) if found.above[place]]
    return Judged(
        measure=what,
        state=found.state,
        said=judgement_said(found, left, what),
        against=found.against,
        n=len(left),
        left=stats.bootstrap_mean(left, seed=seed),
        level=None if found.level is None else stats.bootstrap_mean(found.level, seed=seed),
        difference=found.difference,
        above=above,
        below=None if found.below is None else int(found.below.sum()),
        expected=found.expected,
    )


def _most(found: Judgement, left: np.ndarray) -> np.ndarray:
    """Places of the samples, first the one that is furthest above its level."""
    return np.argsort(-(left if found.level is None else left - found.level), kind="stable")


def _costs(known: Evidence, seed: int) -> list[Cost]:
    made = []
    for part, name in KEPT.items():
        if known.before is None or part not in known.after.sets or part not in known.before.sets:
            continue
        for measure, said_as in COSTS.items():
            if measure in known.after.sets[part] and measure in known.before.sets[part]:
                start, end = (one.sets[part][measure] for one in (known.before, known.after))
                made.append(_cost(name, said_as, start, end, seed))
    return made


def _cost(name: str, measure: str, start: np.ndarray, end: np.ndarray, seed: int) -> Cost:
    return cost(name, measure, len(end), *(stats.bootstrap_mean(values, seed=seed) for values in (start, end)))


def cost(name: str, measure: str, n: int | None, before: Interval, after: Interval) -> Cost:
    """What a set had and has, and whether more of it went than may go without a warning."""
    lost = share_lost(before.value, after.value)
    costly = lost is not None and lost > COSTLY
    return Cost(set=name, measure=measure, n=n, before=before, after=after, lost=lost, warning=costly)


def _cost_said(costs: Sequence[Cost], known: Evidence) -> str:
    if known.before is None:
        return f"What it cost cannot be said without the model before unlearning ({known.needs.before})."
    if not costs:
        return f"What it cost cannot be said without a set that was to be kept ({known.needs.kept})."
    told = []
    for name in dict.fromkeys(row.set for row in costs):
        figures = [
            f"{row.measure} {_number(row.before)} -> {_number(row.after)}"
            + ("" if row.lost is None else f" ({_change(row.lost)})")
            for row in costs
            if row.set == name
        ]
        told.append(f"{name} samples: {', '.join(figures)}")
    lost = list(dict.fromkeys(row.set for row in costs if row.warning))
    warning = f" Warning: more than {COSTLY:.0%} went, of {' and '.join(lost)} samples." if lost else ""
    return "; ".join(told) + "." + warning


def _change(lost: float) -> str:
    """The share that went, in percent, as a change; none is no negative one."""
    return f"{round(-100 * lost, 1) + 0.0:+.1f}%"


def _number(interval: Interval) -> str:
    return f"{interval.value:.3f}" if np.isfinite(interval.value) else "n/a"


def _parts(known: Evidence, found: Judgement, left: np.ndarray, seed: int) -> list[Part]:
    """All forget samples, their difficulty buckets (1 = easiest), and the groups of which most is left."""
    names: list[tuple[str, np.ndarray]] = [("all forget samples", np.ones(len(left), dtype=bool))]
    masks = masks_of(known.buckets)
    ends = {1: " (easiest)", len(masks): " (hardest)"} if len(masks) > 1 else {}
    names += [(f"bucket {number}{ends.get(number, '')}", mask) for number, mask in enumerate(masks, start=1)]
    if known.groups.forget is not None:
        labels = np.array(group_labels(list(known.groups.forget)))
        groups = [(str(name), labels == name) for name in np.unique(labels)]
        groups.sort(key=lambda one: -float(np.nan_to_num(left[one[1]].mean(), nan=-1.0)))
        names += [(f"group {name}", inside) for name, inside in groups[:GROUPS_SHOWN]]
    start = None if known.before is None else known.before.sets["forget"]["probability"]
    return [
        Part(
            part=name,
            n=int(inside.sum()),
            before=None if start is None else stats.bootstrap_mean(start[inside], seed=seed),
            after=stats.bootstrap_mean(left[inside], seed=seed),
            level=None if found.level is None else stats.bootstrap_mean(found.level[inside], seed=seed),
            above=None if found.above is None else int(found.above[inside].sum()),
        )
        for name, inside in names
    ]


def _whom_said(known: Evidence, parts: Sequence[Part], found: Judgement) -> str:
    """Of whom most is left: by difficulty bucket and by group."""
    buckets = [row for row in parts if row.part.startswith("bucket ")]
    groups = [row for row in parts if row.part.startswith("group ")]
    told = []
    if buckets and known.buckets is not None:
        ends = "; ".join(f"{row.part} {_left(row)}" for row in (buckets[0], buckets[-1]))
        told.append(f"By difficulty ({known.buckets.metric}): {ends}.")
    if groups:
        told.append(f"Most is left of {groups[0].part}: {_left(groups[0])}.")
    if not told:
        return known.needs.parts
    return " ".join(told)


def _left(row: Part) -> str:
    above = "" if row.above is None else f", {row.above} of {row.n} above the line"
    return f"{_number(row.after)} is left{above}"


def _samples(known: Evidence, found: Judgement, left: np.ndarray) -> list[Leaking]:
    """The samples that are furthest above their level; without one, of which most is left."""
    start = None if known.before is None else known.before.sets["forget"]["probability"]
    labels = None if known.groups.forget is None else group_labels(list(known.groups.forget))
    return [
        Leaking(
            sample_id=str(known.ids[place]),
            after=float(left[place]),
            before=None if start is None else float(start[place]),
            level=None if found.level is None else float(found.level[place]),
            line=None if found.line is None else float(found.line[place]),
            above=None if found.above is None else bool(found.above[place]),
            bucket=None if known.buckets is None else int(known.buckets.number[place]) + 1,
            group=None if labels is None else str(labels[place]),
        )
        for place in _most(found, left)[:SHOWN].tolist()
    ]


def returned(known: Evidence, seed: int) -> list[Returned]:
    """Was it only hidden? Each way to bring it back with its control, or why it cannot be told."""
    made = []
    for attack, needed in (("relearning", known.needs.relearning), ("quantisation", known.needs.quantisation)):
        rows = [row for row in known.attacks if row.attack == attack]
        if not rows:
            made.append(Returned(how=attack, answer=UNTRIED, said=needed))
            continue
        made.append(returned_by(_strongest(rows) if attack == "quantisation" else rows[-1]))
    return [*made, _reworded(known, seed), _sampled(known, seed)]


def returned_by(row: AttackRow) -> Returned:
    """Whether one attack brings it back."""
    return Returned(how=f"{row.attack}, {row.condition}", answer=_answer(row), said=_attack_said(row))


def _attack_said(row: AttackRow) -> str:
    """What the attack changes, and what that is worth; the findings have the intervals."""
    if row.beyond is None or row.control is None:
        line = f"answer probability {row.change.value:+.3f}"
        if _answer(row) == NO:
            return f"{line}: no rise"
        return f"{line}; what any text would gain is not known without --holdout_dataset"
    figures = f"answer probability {row.change.value:+.3f}, never-seen samples {row.control.value:+.3f}"
    return f"{figures}: {judged(row.beyond)}"


def _strongest(rows: Sequence[AttackRow]) -> AttackRow:
    """The rounding that brings most back."""
    return max(rows, key=lambda row: np.nan_to_num((row.beyond or row.change).value, nan=-1.0))


def _answer(row: AttackRow) -> str:
    if row.beyond is None:
        return NO if row.change.low <= VISIBLE else UNTOLD  # NaN: cannot be told
    return _more(row.beyond)


def _more(difference: Interval) -> str:
    """Whether more comes back than the control has."""
    if not (np.isfinite(difference.low) and np.isfinite(difference.high)):
        return UNTOLD
    return YES if difference.low > 0 and difference.value > MARGIN else NO


def _reworded(known: Evidence, seed: int) -> Returned:
    """The question in other words, beside what that changes for a model that never saw the samples."""
    asked = known.after.paraphrased
    if asked is None:
        return Returned(how="rewording", answer=UNTRIED, said=known.needs.rewording)
    change = asked - known.after.sets["forget"]["probability"]
    told = known.reference.paraphrased if known.reference is not None else None
    row = attack_row("rewording", "the question in other words", change, None, known.groups, seed)
    if told is None or known.reference is None:
        line = f"the answers change by {row.change.value:+.3f}; without a reference model it cannot be told whether "
        return Returned(how="rewording", answer=_answer(row), said=line + "that was hidden")
    theirs = told - known.reference.sets["forget"]["probability"]
    pair = attack_row("rewording", "", change - theirs, None, known.groups, seed).change  # the same samples
    line = f"the answers change by {row.change.value:+.3f}, those of the reference model by {theirs.mean():+.3f}"
    words = {YES: "more comes back than there", NO: "not more than there", UNTOLD: "too little to tell"}
    return Returned(how="rewording", answer=_more(pair), said=f"{line}: {words[_more(pair)]}")


def _sampled(known: Evidence, seed: int) -> Returned:
    """Sampled answers, beside those of a control."""
    if known.leak is None or "forget" not in known.after.leaks:
        return Returned(how="sampled answers", answer=UNTRIED, said=known.needs.sampled)
    own, n = known.after.leaks["forget"], known.leak.n
    kind = next(kind for kind in HEADLINE if kind in own)
    present = controls(known.after, known.reference)
    difference, name = beyond(own, present, kind, n, n, known.groups, seed)
    line = f"{int((own[kind] > 0).sum())} of {len(own[kind])} samples leak in {n} answers each ({kind})"
    if difference is None:
        answer = UNTOLD if (own[kind] > 0).any() else NO
        line += "; without a control it cannot be told how much of that anybody would guess"
    else:
        answer = _more(difference)
        words = {YES: "more than with", NO: "not more than with", UNTOLD: "too little to tell from"}
        line += f": {words[answer]} the {name}" if name else ""
    return Returned(how="sampled answers", answer=answer, said=line)
