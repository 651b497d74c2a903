"""A process that ends with the one that started it, however that one ended."""

from __future__ import annotations

import os
import sys
import threading


def end_with_parent() -> None:
    """End this process at once when its standard input ends.

    For a process whose standard input is a pipe that its parent holds open and never writes to. The kernel closes that
    pipe when the parent is gone, also when it was killed: on every platform, and without a window between the start
    and this call.
    """

    def watch() -> None:
        try:
            while os.read(standard_input, 1):
                pass
        finally:
            os._exit(1)

    standard_input = sys.stdin.fileno()
    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
