"""Seconds and peak memory of work on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .record import free

Work = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Work, device: torch.device) -> float:
    """Seconds that `work` takes on the device, by events where it has them."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    begin.record()
    work()
    end.record()
    synchronize(device)
    return begin.elapsed_time(end) / 1e3


def peak_gib(work: Work, device: torch.device) -> float | None:
    """Most memory that `work` took above what was taken before, in GiB; `None` where the device does not say.

    As a warm-up of what is timed next, it costs nothing.
    """
    if device.type != "cuda":
        work()
        return None
    free()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def compare(work: dict[str, Work], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turn, the other way round every second time: a drift of the clock favours nobody."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats):
        for name in list(work)[:: 1 if repeat % 2 == 0 else -1]:
            found[name].append(seconds(work[name], device))
    return found


def ratio(ours: list[float], floor: list[float]) -> dict[str, float]:
    """Median, lowest and highest of the ratios, pair by pair."""
    ratios = sorted(a / b for a, b in zip(ours, floor, strict=True))
    return {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
