"""The JSON of a part: written after every figure, so that a run that is cut off loses one at most, and can go on."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cud_trainer.files import write_json
from cud_trainer.models.fingerprint import versions

OUT_OF_MEMORY = "out of memory"


def plain(value: Any) -> Any:
    """`value` as strict JSON with six significant digits; numbers that are not finite become text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str | None):
        return value
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else str(number)


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name and memory of what computes, and what belongs to it."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    found: dict[str, Any] = {"machine": machine, "python": platform.python_version()}
    if device.type != "cuda":
        return {"name": "CPU", **found}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "float32_matmul": torch.get_float32_matmul_precision(),
        **found,
    }


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


def free() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Record:
    """Figures of one part, by key.

    A figure is a dictionary. One that failed has `"error"` (tried again by the next run) or `"out_of_memory"`; one that
    there was no time for is listed under `"left_out"`.

    Args:
        path: of the JSON file.
        part: name of the part.
        device: what computes.
        budget_s: seconds from now on after which no further figure is begun.
        tiny: whether the figures only show that everything runs.
        earlier: JSON file of a run that was cut off, taken up where `path` does not exist yet.

    Raises:
        ValueError: when the file is of another part, or tiny figures would be mixed with real ones.
    """

    def __init__(
        self, path: Path, part: str, device: torch.device, budget_s: float, *, tiny: bool, earlier: Path | None = None
    ) -> None:
        self.path, self.budget_s, self._start = path, budget_s, time.monotonic()
        source = next((file for file in (path, earlier) if file is not None and file.exists()), None)
        self.state: dict[str, Any] = {"part": part, "tiny": tiny, "status": "", "pieces": [], "figures": {}}
        if source is not None:
            found = json.loads(source.read_text(encoding="utf-8"))
            if found.get("part") != part or found.get("tiny") != tiny:
                what = f"part {found.get('part')!r}, tiny {found.get('tiny')}"
                raise ValueError(f"{source} holds {what}: choose another folder")
            self.state = found
        self.state["left_out"] = []
        self.pieces.append({"device": describe_device(device), "versions": versions(), "budget_s": budget_s})
        self.save("cut off")

    @property
    def figures(self) -> dict[str, Any]:
        return self.state["figures"]

    @property
    def pieces(self) -> list[dict[str, Any]]:
        return self.state["pieces"]

    @property
    def elapsed(self) -> float:
        """Seconds since this piece began."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget_s - self.elapsed

    @property
    def failed(self) -> list[str]:
        """Keys of figures that ended in an error."""
        return [key for key, figure in self.figures.items() if "error" in figure]

    def done(self, key: str) -> bool:
        return key in self.figures and "error" not in self.figures[key]

    def figure(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The figure of `key`, made now unless an earlier run has it; `None` when there is no time left for it."""
        if self.done(key):
            return self.figures[key]
        if self.left <= 0:
            self.leave_out(key)
            return None
        start = time.monotonic()
        try:
            found = make()
        except Exception as error:  # the other figures are worth having
            found = failure(error)
        free()
        return self.keep(key, {**found, "took_s": time.monotonic() - start})

    def keep(self, key: str, figure: dict[str, Any]) -> dict[str, Any]:
        """Put a figure down."""
        self.figures[key] = plain({**figure, "piece": len(self.pieces) - 1})
        self.save("cut off")
        shown = {name: value for name, value in self.figures[key].items() if not isinstance(value, list | dict)}
        print(f"[{self.elapsed:5.0f} s] {key}: {json.dumps(shown)[:240]}", flush=True)
        return self.figures[key]

    def leave_out(self, key: str) -> None:
        self.state["left_out"].append(key)

    def save(self, status: str) -> None:
        self.pieces[-1]["seconds"] = round(self.elapsed, 1)
        self.state["status"] = status
        write_json(self.path, plain(self.state))

    def finish(self) -> str:
        """Say how the part ended: `complete`, or `out of budget` with what was left out."""
        status = "out of budget" if self.state["left_out"] else "complete"
        self.save(f"{status}, {len(self.failed)} failed" if self.failed else status)
        return self.state["status"]


def failure(error: Exception) -> dict[str, str]:
    """A figure that says what went wrong."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return {"out_of_memory": text} if out_of_memory(error) else {"error": text}
