"""Run by test_shared_passes, in one or more processes: `cud evaluate`, of which the last process may die early.

Usage: evaluating_worker.py PARTS [OPTION ...]: the last process kills itself after it has kept so many parts; 0: never.
"""

import os
import signal
import sys

from cud_trainer import resumable
from cud_trainer.cli import main


def dying_after(parts: int) -> None:
    save, left = resumable.WorkDir.save, [parts]

    def dying(self, name, tensors):
        save(self, name, tensors)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    resumable.WorkDir.save = dying


if __name__ == "__main__":
    state = resumable.process_state()
    assert state.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    if int(sys.argv[1]) and state.is_last_process:
        dying_after(int(sys.argv[1]))
    code = main(sys.argv[2:])
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # see ddp_worker
