"""`cud study`: many unlearning runs that differ in chosen options, compared at matched retain utility."""

from __future__ import annotations

import sys

from .engine import Study
from .options import read_arguments
from .report import write_study


def main(argv: list[str]) -> int:
    """Entry point of `cud study`."""
    study = Study(*read_arguments(argv))
    with study.locked():
        finished = study.run(argv)
        report = write_study(finished, "cud study " + " ".join(argv))
    for name, reason in finished.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if report is not None:
        print(f"report: {report.resolve()}")
    return 1 if finished.failed else 0
