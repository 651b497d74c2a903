"""Lets a process die at a chosen moment, for tests and benchmarks of kills.

A moment is a change of a file below a folder (opened to write, moved, deleted, a folder made) or a forward pass of a
language model. Moments are counted over all processes of a command, in a file; the process that comes to number N is
killed. Call `watch` in a process that has started; for those that it starts, Python runs `sitecustomize` at every start: with this folder's `sitecustomize.py` in the path, and

    CUD_DIE='{"folder": ..., "count": ..., "at": N}'

in the environment, every process of a command takes part. With `at` 0 moments are only counted.
"""

import json
import os
import signal
import sys

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(folder: str, count: str, at: int) -> None:
    """Count moments below `folder` in the file `count`; die at number `at`."""
    folder, busy = os.path.realpath(folder), []

    def moment() -> None:
        if busy:
            return
        busy.append(True)
        try:
            with open(count, "ab", buffering=0) as file:
                file.write(b".")
            if at and os.path.getsize(count) == at:
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            busy.clear()

    def heard(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and bool(flags & WRITES)
        elif event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"):
            path, changes = arguments[0], True
        else:
            return
        if changes and isinstance(path, (str, bytes, os.PathLike)):
            text = os.fsdecode(path)
            if text.startswith(folder) or os.path.abspath(text).startswith(folder):
                moment()

    sys.addaudithook(heard)

    def forward(module: object, _: object) -> None:
        if type(module).__name__.endswith("ForCausalLM"):
            moment()

    class Torch:
        """Registers the hook once torch is there: importing it here would cost every process its time."""

        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "torch.nn.parallel" and "torch.nn.modules.module" in sys.modules:
                sys.modules["torch.nn.modules.module"].register_module_forward_pre_hook(forward)
                sys.meta_path.remove(self)

    if "torch.nn.parallel" in sys.modules:
        sys.modules["torch.nn.modules.module"].register_module_forward_pre_hook(forward)
    else:
        sys.meta_path.insert(0, Torch())


if os.environ.get("CUD_DIE", "null") != "null":
    watch(**json.loads(os.environ["CUD_DIE"]))
