"""The last lines of the commands of this package: what was done, what was written, and what comes next."""

from __future__ import annotations

from pathlib import Path


def last_lines(done: str, report: Path, following: str) -> str:
    """Three lines.

    Args:
        done: what was done and measured.
        report: the page that was written; the files behind it are named.
        following: what comes next.
    """
    report = report.resolve()
    files = [name for name in ("results.json", "per_sample.parquet", "summary.md") if (report.parent / name).is_file()]
    beside = f" ({', '.join(files)} beside it)" if files else ""
    return f"{done}\nwritten: report: {report}{beside}\nnext: {following}"


def after_evaluating(level: bool, original: bool) -> str:
    """What comes after `cud evaluate`.

    Args:
        level: whether there was a reference model or a holdout set.
        original: whether the model before unlearning was measured.
    """
    if not level:
        return "whether it is gone cannot be said without --holdout_dataset (never seen) or --reference_model; give one"
    if not original:
        return "what it cost cannot be said without --original_model; give it"
    return "open the report; was it only hidden? --relearn_samples 4 --quantize 8 4"
