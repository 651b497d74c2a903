"""Cells that fail in every way there is, for tests of the processes that work on them."""

import ctypes
import errno
import os
import signal
import time


def work(study, cell):
    what = cell.settings["what"]
    if what == "killed":
        print("it was here", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "wrong":
        raise ValueError("a value\nis wrong")
    elif what == "bug":
        raise RuntimeError("of ours")
    elif what == "full":
        raise RuntimeError("lost") from OSError(errno.ENOSPC, "No space left on device")
    elif what == "waits":
        print("it waits", flush=True)
        while not (study / "go").exists():
            time.sleep(0.05)
    library = ctypes.CDLL(None)
    library.puts(b"a line from C")
    library.fflush(None)
    print("a line from Python")
    environment = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    return {"process": os.getpid(), **environment}
