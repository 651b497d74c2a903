"""What long sets cost: time and memory of every stage that goes through all retain samples, and of long schedules.

    nice python benchmarks/scale.py --output benchmarks/results/scale.json
    python benchmarks/scale.py --table      # that of docs/scale.md, from the committed results

Retain sets of 2,000, 20,000 and 200,000 short samples, as JSON Lines of questions and answers and of conversations
(ShareGPT, through a chat template), beside 400 forget samples; and schedules of up to 1,000,000 rows. Every size has a
process of its own. Time is that of the CPU, with one thread of torch. Memory is the anonymous memory of that process
(files that are mapped do not count) above what it held when the stage began: at its highest, and what stays. `arrow`
is the size of the prepared columns, which stay in memory on purpose (no text goes into a cache). The model is tiny, so
that a forward pass costs little and what is seen is what goes through the samples.

`growth` is what ten times as many rows cost: the figure at a size over that at the size before it; 10 is linear, 100
quadratic. What a stage costs whatever the size makes it smaller. `all` is the whole process from the first stage on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM

from cud_trainer.data import check_disjoint, load_samples, prepare_samples
from cud_trainer.files import write_json
from cud_trainer.logprobs import answer_probability
from cud_trainer.objectives import UnlearningLoss
from cud_trainer.schedule import Schedule, make_schedule
from cud_trainer.training.neighbours import Nearest
from evaluation.metrics.memorization import teacher_forced
from evaluation.testbed import build_testbed, train_tokenizer

SIZES = (2_000, 20_000, 200_000)
SCHEDULED = (10_000, 100_000, 1_000_000)
FORGET = 400
TOP_K = 16
HIDDEN = 32
BATCH = 256
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ '<eos>' if m['role'] == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
RESULTS = Path(__file__).parent / "results" / "scale.json"


def anonymous() -> int:
    """Bytes of this process's memory that no file stands for."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("RssAnon:")[1].split()[0])


class Stages:
    """Runs stages and writes down what each took."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        before, peak, over = anonymous(), [0], threading.Event()

        def watch() -> None:
            while not over.wait(0.02):
                peak[0] = max(peak[0], anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.process_time()
        result = work()
        seconds = time.process_time() - started
        over.set()
        watcher.join()
        after = anonymous()
        highest = max(peak[0], after)
        self.found[name] = {
            "cpu_seconds": seconds,
            "peak_megabytes": (highest - before) / 2**20,
            "kept_megabytes": (after - before) / 2**20,
        }
        print(f"  {name}: {seconds:.2f} s, {(highest - before) / 2**20:.0f} MB at most", file=sys.stderr, flush=True)
        return result


def written(folder: str, form: str, size: int, first: int) -> str:
    """A file of so many samples, each with a number of its own."""
    rows, path = build_testbed(seed=0).train, Path(folder) / f"{form}-{first}.jsonl"
    with path.open("w") as file:
        for number in range(first, first + size):
            row = rows[number % len(rows)]
            question, answer = row["question"], f"{row['answer']} {number}"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            one = {"question": question, "answer": answer} if form == "plain" else {"conversations": turns}
            file.write(json.dumps(one) + "\n")
    return str(path)


def through_samples(size: int, form: str) -> dict[str, Any]:
    """Every stage of a run and of an evaluation that reads all `size` retain samples."""
    tokenizer = train_tokenizer(build_testbed(seed=0).texts())
    if form == "chat":
        tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval()
    stages, whole = Stages(), Stages()
    found: dict[str, Any] = {"rows": size}
    with tempfile.TemporaryDirectory() as folder:
        ours = prepare_samples(
            load_samples(written(folder, form, FORGET, 10 * size), None, "train", None, "forget"), tokenizer
        )
        answer_probability(model, ours)  # what the first forward pass loads
        path = written(folder, form, size, 0)

        def all_of_it() -> None:
            data = stages.run("reading", lambda: load_samples(path, None, "train", None, "retain"))
            retain = stages.run("preparation", lambda: prepare_samples(data, tokenizer, name="retain"))
            found["arrow_megabytes"] = retain.dataset.data.nbytes / 2**20
            stages.run("fingerprint", lambda: retain.fingerprint)
            stages.run("overlap", lambda: check_disjoint(ours, retain))
            if form == "plain":
                stages.run("pairing", lambda: pair(size))
                loss = UnlearningLoss("graddiff", {}, "kl", TOP_K)
                options = {"batch_size": BATCH, "device": "cpu"}
                reference = stages.run("retain quantities", lambda: loss.reference(model, ours, retain, **options))
                top = reference.retain_top
                found["quantities_megabytes"] = (
                    sum(values.nbytes for kind in (top.logps, top.ids, top.rest) for values in kind) / 2**20
                )
                del reference, top
            stages.run("evaluation", lambda: teacher_forced(model, retain, tokenizer, batch_size=BATCH))

        whole.run("all", all_of_it)
    return {**found, "stages": stages.found | whole.found}


def pair(size: int) -> None:
    near = Nearest(np.random.default_rng(0).normal(size=(FORGET, HIDDEN)), 8)
    generator = np.random.default_rng(1)
    for start in range(0, size, BATCH):
        rows = np.arange(start, min(start + BATCH, size))
        near.see(rows, generator.normal(size=(len(rows), HIDDEN)).astype(np.float32))
    near.found()


def through_schedule(size: int) -> dict[str, Any]:
    """A schedule of `size` rows, five passes, as a run makes, serves, writes and reads it."""
    forget, retain = ([f"sha256:{number:016x}" for number in range(first, first + size // 5)] for first in (0, 10**7))
    difficulty = np.random.default_rng(0).normal(size=len(forget))
    options = {"difficulty": difficulty, "retain_ids": retain, "passes": 5}
    lengths = np.random.default_rng(1).integers(1, 30, len(forget))
    stages, start = Stages(), anonymous()
    whole = Stages()

    def all_of_it() -> None:
        schedule = stages.run("schedule", lambda: make_schedule("easy_to_hard+inverse_mass", forget, **options))
        rows = stages.run("rows", lambda: schedule.rows(forget, retain, 32, forget_lengths=lengths))
        dataset = stages.run("training rows", lambda: Dataset.from_dict(rows))
        assert len(dataset) >= size
        stages.run("hash", lambda: schedule.hash)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "schedule.parquet"
            stages.run("save", lambda: schedule.save(path))
            assert stages.run("load", lambda: Schedule.load(path)).order.shape == (size,)

    whole.run("all", all_of_it)
    stages.found["all"] = whole.found["all"]
    return {"rows": size, "ids_megabytes": start / 2**20, "stages": stages.found}


def growth(entries: list[dict[str, Any]], figure: str) -> dict[str, list[float | None]]:
    """By stage: the figure at each size over that at the size before; `None` where that is next to nothing."""
    least = {"cpu_seconds": 0.02, "peak_megabytes": 4.0}[figure]
    found = {}
    for name in entries[0]["stages"]:
        values = [entry["stages"][name][figure] for entry in entries]
        found[name] = [round(after / before, 2) if before >= least else None for before, after in pairwise(values)]
    return found


def table(result: dict[str, Any]) -> str:
    """The table of docs/scale.md."""
    lines = ["| 200,000 samples | CPU s | MB | CPU s, tenfold | MB, tenfold |", "|---|---|---|---|---|"]
    for kind, title in (("plain", "questions and answers"), ("chat", "conversations"), ("schedule", "schedule")):
        last, grown = result[kind]["table"][-1], result[kind]["growth"]
        if kind == "schedule":
            lines += [
                "",
                f"| {last['rows']:,} rows | CPU s | MB | CPU s, tenfold | MB, tenfold |",
                "|---|---|---|---|---|",
            ]
        for stage, values in last["stages"].items():
            times, sizes = (
                " and ".join("-" if one is None else f"{one:.1f}" for one in grown[figure][stage])
                for figure in ("cpu_seconds", "peak_megabytes")
            )
            cost = f"{values['cpu_seconds']:.2g} | {max(0, values['peak_megabytes']):.0f}"
            lines.append(f"| {title}: {stage} | {cost} | {times} | {sizes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--scheduled", type=int, nargs="+", default=SCHEDULED)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table of docs/scale.md and measure nothing")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    if args.only:
        kind, size = args.only.split(":")
        torch.set_num_threads(1)
        disable_progress_bars()
        found = through_schedule(int(size)) if kind == "schedule" else through_samples(int(size), kind)
        print(json.dumps(found))
        return
    from attribution import machine  # beside this file: there for the script alone

    result: dict[str, Any] = {"command": "nice python benchmarks/scale.py", "machine": machine()}
    result |= {"forget_samples": FORGET, "hidden_size": HIDDEN, "top_k": TOP_K}
    for kind, sizes in (("plain", args.sizes), ("chat", args.sizes), ("schedule", args.scheduled)):
        entries = []
        for size in sizes:
            print(f"{kind}, {size} rows", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--only", f"{kind}:{size}"]
            entries.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        result[kind] = {
            "table": entries,
            "growth": {figure: growth(entries, figure) for figure in ("cpu_seconds", "peak_megabytes")},
        }
    write_json(args.output, result)


if __name__ == "__main__":
    main()
