"""What the order of prompts and their batches cost generation for evaluation, as ratios in one run.

    python benchmarks/generate.py --output benchmarks/results/generate.json

The same greedy answers, all up to their limits: bare `generate` in the order of the rows, sorted from the shortest,
and one by one, each over `continuations`, which sorts, cuts, and puts the answers back into the order of the rows.
Prompts of 8 to 40 random tokens; answers of 32 in the median (log-normal, sigma 0.6, 4 to 128). CPU time, one thread;
alternated, `--repeats` times; median, lowest, highest. `steps`: of decoding, over those of ours; they do not depend on
the machine.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from cud_trainer.files import write_json
from cud_trainer.models.generation import continuations

BATCH = 16


def steps(limits: list[int], batch_size: int = BATCH) -> int:
    """Decoding steps of batches that follow each other: each goes to its longest limit."""
    return sum(max(limits[first : first + batch_size]) for first in range(0, len(limits), batch_size))


def main() -> None:
    from attribution import machine  # the scripts beside this one
    from evaluate import written
    from timing import alternated, said, small_llama, spread

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--answers", type=int, default=60)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--output", type=Path, default=Path("generate.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = small_llama(args)
    rng = np.random.default_rng(0)
    limits = np.exp(rng.normal(np.log(32), 0.6, args.answers)).round().clip(4, 128).astype(int).tolist()
    prompts = [rng.integers(1, 32000, size).tolist() for size in rng.integers(8, 41, args.answers)]
    rows = list(zip(limits, prompts, strict=True))
    rising = sorted(rows, key=lambda row: row[0])
    work = {
        "ours": lambda: continuations(model, prompts, limits, stop=[], pad=0, batch_size=BATCH),
        "in the order of the rows": lambda: written(model, rows, 0, None, BATCH),
        "sorted from the shortest": lambda: written(model, rising, 0, None, BATCH),
        "one by one": lambda: written(model, rows, 0, None, 1),
    }
    seconds = alternated(work, args.repeats)
    ours = steps(sorted(limits, reverse=True))
    counted = {
        "in the order of the rows": steps(limits),
        "sorted from the shortest": steps(sorted(limits)),
        "one by one": steps(limits, 1),
    }
    table = []
    for name, taken in counted.items():
        table.append({"what": name, "steps": taken / ours, **spread(seconds[name] / seconds["ours"])})
        print(f"{name}: {said(table[-1])} of ours; steps {taken / ours:.3f}")
    result = {
        "command": "python benchmarks/generate.py",
        "answers": args.answers,
        "batch": BATCH,
        "machine": machine(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "table": table,
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
    }
    write_json(args.output, result)


if __name__ == "__main__":
    main()
