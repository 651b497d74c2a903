"""`cud study`: many unlearning runs that differ in chosen options, compared at matched retain utility."""

from __future__ import annotations

import sys

from ..commands.endings import answers_of_runs, last_lines
from .engine import Study
from .options import read_arguments
from .report import write_study


def main(argv: list[str]) -> int:
    """Entry point of `cud study`."""
    study = Study(*read_arguments(argv))
    with study.locked():
        try:
            finished = study.run(argv)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{study.progress()} The same command goes on from there.") from None
        written = write_study(finished, "cud study " + " ".join(argv))
    for name, reason in finished.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    done = f"{len(finished.cells)} runs compared, {len(finished.failed)} cells failed; all are in {finished.folder}"
    again = "the same command runs what failed once more" if finished.failed else "open the report"
    if written is None:
        print(f"{done}\nnext: {again if finished.failed else 'nothing'}")
    else:
        print(last_lines(done, written[0], again, answers_of_runs(written[1])))
    return 1 if finished.failed else 0
