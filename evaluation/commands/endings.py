"""The last lines of the commands of this package: what was done, what was written, and what comes next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..report.story import UNTRIED
from ..report.verdict import HIDDEN, LEAKING, OVER, UNKNOWN
from ..report.verdict_schema import Verdict, Verdicts


def last_lines(done: str, report: Path, following: str, found: Sequence[str] = ()) -> str:
    """Some lines.

    Args:
        done: what was done and measured.
        report: the page that was written; the files behind it are named.
        following: what comes next.
        found: what was found, a line each.
    """
    report = report.resolve()
    files = [name for name in ("results.json", "per_sample.parquet", "summary.md") if (report.parent / name).is_file()]
    beside = f" ({', '.join(files)} beside it)" if files else ""
    return "\n".join([done, *found, f"written: report: {report}{beside}", f"next: {following}"])


def answers(verdict: Verdict) -> list[str]:
    """The verdict, as the report has it."""
    ids = f" ({', '.join(verdict.ids)})" if verdict.ids else ""
    hidden = ", ".join(f"{row.how}: {row.answer}" for row in verdict.hidden)
    return [
        f"is it gone? {verdict.headline}{ids}",
        f"what did it cost? {verdict.cost}",
        f"for whom? {verdict.whom}",
        f"was it only hidden? {hidden}",
    ]


def answers_of_runs(verdicts: Verdicts) -> list[str]:
    """The same of many runs, a line for each arm."""
    hidden = ", ".join(f"{row.how}: {row.answer}" for row in verdicts.hidden)
    arms = [f"- {row.said}" for row in verdicts.arms]
    compared = [f"how do they compare? {line}" for line in verdicts.compared]
    return [f"is it gone? {verdicts.answer} {verdicts.headline}", *arms, *compared, f"was it only hidden? {hidden}"]


def after_evaluating(verdict: Verdict) -> str:
    """What comes after `cud evaluate`."""
    if verdict.state == UNKNOWN and all(row.against is None for row in verdict.judged):
        return "whether it is gone cannot be said without --holdout_dataset (never seen) or --reference_model; give one"
    if all(part.before is None for part in verdict.parts):
        if verdict.state == LEAKING:
            return "cud train, if nothing is unlearned yet; else give --original_model for what it cost"
        return "what it cost cannot be said without --original_model; give it"
    if verdict.state == HIDDEN:
        return "open the report; hidden is not gone: try all weights or another objective, and evaluate it the same way"
    if verdict.state == LEAKING:
        return "open the report for the samples that leak most; train longer, or let the schedule weight these up"
    if verdict.state == OVER:
        return "open the report; train for fewer passes, or end runs earlier (docs/training.md)"
    if any(row.answer == UNTRIED for row in verdict.hidden):
        return "open the report; was it only hidden? --relearn_samples 4 --quantize 8 4"
    return "open the report"
