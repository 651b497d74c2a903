"""`python3 -m benchmarks.gpu`: see docs/gpu.md."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

PARTS = ("right", "fast", "decisive")
ITSELF = "the part itself"  # key of an error outside of any figure


def budgets(words: list[str], parts: list[str], defaults: dict[str, float]) -> dict[str, float]:
    """Seconds by part, from `300` (of each part) or `right=100 fast=400`.

    Raises:
        ValueError: for anything else.
    """
    found = dict(defaults)
    for word in words:
        name, _, number = word.rpartition("=")
        try:
            seconds = float(number)
        except ValueError:
            seconds = -1.0
        if name not in ("", *PARTS) or not 0 < seconds < float("inf"):
            raise ValueError(f"--budget-s takes seconds, or PART=SECONDS with one of {list(PARTS)}, got {word!r}")
        found.update(dict.fromkeys(parts if not name else [name], seconds))
    return found


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description="What can only be measured on a GPU.")
    found.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; by default all, in this order")
    found.add_argument("--tiny", action="store_true", help="everything small, on the CPU: shows that it runs")
    found.add_argument("--budget-s", nargs="+", default=[], metavar="S", help="seconds of each part, or PART=SECONDS")
    found.add_argument("--output_dir", type=Path, default=Path("gpu-results"), help="where the JSON files are written")
    found.add_argument("--resume_from", type=Path, help="folder with the JSON files of a run that was cut off")
    found.add_argument("--work_dir", type=Path, help="what is trained; by default $GPU_HOME/work, or in output_dir")
    found.add_argument("--processes", type=int, help="runs of part decisive that share the GPU (6)")
    return found


def refuse(message: str) -> int:
    print(f"benchmarks.gpu: {message}", file=sys.stderr)
    return 2


def main(arguments: list[str] | None = None) -> int:
    """Run parts; 0, 1 when a figure failed, 2 when nothing can be run."""
    args = parser().parse_args(arguments)
    args.parts = args.parts or list(PARTS)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        return refuse(f"unknown part {unknown[0]!r}; choose from {list(PARTS)}")
    if args.processes is not None and args.processes < 1:
        return refuse(f"--processes must be at least 1, got {args.processes}")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # several would make the trainer use them all
    import torch

    if not args.tiny and not torch.cuda.is_available():
        return refuse("there is no CUDA device; --tiny runs every part, small, on the CPU")
    from transformers.utils.logging import disable_progress_bar, set_verbosity

    from . import decisive, fast, right

    modules: dict[str, Any] = {"right": right, "fast": fast, "decisive": decisive}
    try:
        seconds = budgets(args.budget_s, args.parts, {name: module.BUDGET_S for name, module in modules.items()})
    except ValueError as error:
        return refuse(str(error))
    warnings.simplefilter("ignore")
    set_verbosity(logging.ERROR)
    disable_progress_bar()
    gc.freeze()  # what the imports made is not looked through again and again
    return run(args, modules, seconds, torch.device("cpu" if args.tiny else "cuda"))


def run(args: argparse.Namespace, modules: dict[str, Any], seconds: dict[str, float], device: Any) -> int:
    """The parts, one after the other, whatever happens to one of them; then the tables."""
    import torch

    from .record import Record, failure
    from .setting import Setting

    home = os.environ.get("GPU_HOME")
    work = args.work_dir or (Path(home) / "work" if home and not args.tiny else args.output_dir / "work")
    setting = Setting(device, args.tiny, os.environ.get("SMOLLM2"), os.environ.get("TOFU"), work.absolute())
    threads = torch.get_num_threads()
    tables, failed = [], False
    for name in args.parts:
        earlier = args.resume_from / f"gpu-{name}.json" if args.resume_from else None
        try:
            record = Record(
                args.output_dir / f"gpu-{name}.json", name, device, seconds[name], tiny=args.tiny, earlier=earlier
            )
        except ValueError as error:
            return refuse(str(error))
        record.figures.pop(ITSELF, None)
        options = {"processes": args.processes} if name == "decisive" else {}
        try:
            if args.tiny:
                torch.set_num_threads(1)
            partial(modules[name].run, record, setting, **options)()
        except Exception as error:  # the next part may go well
            record.keep(ITSELF, failure(error))
        finally:
            torch.set_num_threads(threads)
        setting.forget_models()
        status = record.finish()
        failed = failed or bool(record.failed)
        shown = modules[name].table(*((record.figures, record.state) if name == "decisive" else (record.figures,)))
        tables += [f"{name}: {status} in {record.elapsed:.0f} s", *shown]
        tables += [f"  failed: {key}: {record.figures[key]['error'][:150]}" for key in record.failed[:5]]
        if record.state["left_out"]:
            tables.append(f"  left out: {len(record.state['left_out'])} figures, first {record.state['left_out'][0]!r}")
    print("\n".join(tables), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
